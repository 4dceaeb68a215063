# shellcheck shell=bash
# Functions for scripts that need Debian packages or wheels of another architecture or release; sourced, not run.
# They need an amd64 or arm64 Debian host with apt-get, change nothing outside the folders they are given, and
# take packages from the mirror and the pip index that the host itself is set up to use.

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$PROJECT/.venv/bin/python

python_of() {  # python_of SUITE: the Python version of a Debian release
  case $1 in
    bookworm) echo 3.11 ;;
    trixie) echo 3.13 ;;
    *) echo "unknown Debian release '$1': use bookworm or trixie" >&2; return 1 ;;
  esac
}

private_apt() {  # private_apt DIR ARCH SUITE: set APT to an apt-get command for ARCH and SUITE with its state in DIR
  local uri key=/usr/share/keyrings/debian-archive-keyring.gpg
  rm -rf "$1"
  mkdir -p "$1"/{lists,cache/archives}/partial
  : > "$1/status"
  # shellcheck disable=SC2016  # the dollars are apt's
  uri=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk '$2 !~ /-/ && $1 ~ /\/debian\/?$/ && !n++ {print $1}')
  [ -n "$uri" ] || { echo "apt knows no Debian mirror: run 'apt-get update' once" >&2; return 1; }
  echo "deb [arch=$2 signed-by=$key] $uri $3 main" > "$1/sources.list"
  APT=(apt-get -qq -o APT::Architecture="$2" -o APT::Architectures="$2"
       -o Dir::Etc::SourceList="$1/sources.list" -o Dir::Etc::SourceParts=/dev/null
       -o Dir::State::Lists="$1/lists" -o Dir::State::status="$1/status" -o Dir::Cache="$1/cache"
       -o Acquire::Languages=none -o APT::Install-Recommends=0 -o APT::Sandbox::User=root -o Debug::NoLocking=1)
  "${APT[@]}" update
}

unpack_packages() {  # unpack_packages ROOT ARCH SUITE PACKAGE...: packages and what they depend on, not configured
  local root=$1 arch=$2 suite=$3 deb name
  shift 3
  private_apt "$root.apt" "$arch" "$suite"
  "${APT[@]}" install -y --download-only "$@"
  mkdir -p "$root"/usr/{bin,lib,sbin} "$root"/var/lib/dpkg/{info,updates,triggers}
  for name in bin lib sbin; do ln -sfn "usr/$name" "$root/$name"; done
  for deb in "$root".apt/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --no-same-owner --keep-directory-symlink
    # what dpkg would have noted, so that a dpkg in there can check dependencies
    dpkg-deb -f "$deb" | sed '/^Package:/a Status: install ok installed' >> "$root/var/lib/dpkg/status"
    echo >> "$root/var/lib/dpkg/status"
    name=$(dpkg-deb -f "$deb" Package)
    [ "$(dpkg-deb -f "$deb" Multi-Arch)" != same ] || name=$name:$arch
    dpkg-deb --fsys-tarfile "$deb" | tar -t | sed 's|^\.||; s|/$||; s|^$|/.|' > "$root/var/lib/dpkg/info/$name.list"
  done
  rm -rf "$root.apt"
}

install_aarch64_wheels() {  # install_aarch64_wheels DIR PYTHON_VERSION REQUIREMENT...: wheels only, unpacked into DIR
  local directory=$1 version=$2 glibc platforms=(--platform manylinux2014_aarch64)
  shift 2
  for glibc in 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  rm -rf "$directory"
  mkdir -p "$directory"
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-compile --target "$directory" \
    --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" "$@"
}

requirements() {  # requirements [EXTRA]: what pyproject.toml declares, one a line, fit for the device's architecture
  "$PYTHON" - "$PROJECT/pyproject.toml" "$@" <<'PY'
import sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[2:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(line for line in wanted if not line.startswith(project["name"])))
PY
}
