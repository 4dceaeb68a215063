"""The maintainer scripts run by dpkg: install, upgrade, remove and purge, on a copy of this system.

The copy is an overlay over `/` in a mount namespace, so nothing of the system itself changes; the package is
a small one with the real unit and the real scripts. No systemd runs there.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
UNIT = "/etc/systemd/system/edge-daemon.service"
WANTED = "/etc/systemd/system/multi-user.target.wants/edge-daemon.service"

INSIDE = """
set -e
mount -t tmpfs over "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay over -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount --rbind /dev dev
mount -t tmpfs run run
mount -t tmpfs dpkg var/lib/dpkg  # an empty database is read in no time
mkdir var/lib/dpkg/info var/lib/dpkg/updates var/lib/dpkg/triggers
touch var/lib/dpkg/status
cp -r "$2" root/packages
exec chroot . sh -e -c "cd /root/packages; $3"
"""

# What systemd makes for a unit with DynamicUser=, and the daemon in there.
RUN_ONCE = """
mkdir -p /var/lib/private/edge-gemma/bundles /var/cache/private/edge-gemma
ln -s private/edge-gemma /var/lib/edge-gemma
ln -s private/edge-gemma /var/cache/edge-gemma
touch /var/lib/edge-gemma/journal.sqlite /var/lib/edge-gemma/journal.sqlite-wal
touch /var/lib/edge-gemma/bundles/daemon.json /var/cache/edge-gemma/weights.xnnpack
"""
INSTALL, UPGRADE, REMOVE, PURGE = (
    "dpkg -i edge-gemma-1.deb",
    "dpkg -i edge-gemma-2.deb",
    "dpkg -r edge-gemma",
    "dpkg -P edge-gemma",
)


def run_inside(folder: Path, packages: Path, script: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--mount", "sh", "-c", INSIDE, "sh", str(folder), str(packages), script]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 and 2 of the small package."""
    if shutil.which("dpkg-deb") is None or shutil.which("deb-systemd-helper") is None:
        pytest.skip("this is no Debian")
    made = tmp_path_factory.mktemp("packages")
    if run_inside(tmp_path_factory.mktemp("try"), made, "true").returncode != 0:
        pytest.skip("an overlay over this system can't be mounted; are you root?")
    tree = tmp_path_factory.mktemp("tree")
    (tree / "DEBIAN").mkdir()
    for name in ("postinst", "prerm", "postrm"):
        shutil.copy(PROJECT / "packaging" / name, tree / "DEBIAN")
        (tree / "DEBIAN" / name).chmod(0o755)
    for folder in ("usr/lib/systemd/system", "usr/lib/edge-gemma/edge"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(PROJECT / "firmware_configs/systemd/edge-daemon.service", tree / "usr/lib/systemd/system")
    (tree / "usr/lib/edge-gemma/edge/errors.py").write_text("x = 1\n")
    for version in (1, 2):
        (tree / "DEBIAN/control").write_text(
            f"Package: edge-gemma\nVersion: {version}\nArchitecture: all\n"
            "Maintainer: a <a@b>\nDescription: a\n"
        )
        deb = made / f"edge-gemma-{version}.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, deb], check=True, capture_output=True
        )
    return made


def left_after(packages: Path, folder: Path, *steps: str) -> set[str]:
    """Return which relevant paths exist after some steps, each of which must succeed."""
    places = ("/etc", "/usr/lib", "/var/lib", "/var/lib/private", "/var/cache", "/var/cache/private")
    paths = [f"{place}/edge-gemma" for place in places]
    paths += [
        UNIT,
        WANTED,
        "/var/lib/edge-gemma/journal.sqlite",
        "/var/lib/edge-gemma/bundles/1/manifest.json",
    ]
    paths += ["/usr/lib/edge-gemma/edge/__pycache__"]
    look = f"for path in {' '.join(paths)}; do ! test -e $path -o -L $path || echo left: $path; done"
    done = run_inside(folder, packages, "\n".join((*steps, look)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rror" not in done.stderr, done.stderr
    return {line.removeprefix("left: ") for line in done.stdout.splitlines() if line.startswith("left: ")}


CODE = {"/usr/lib/edge-gemma", "/usr/lib/edge-gemma/edge/__pycache__", WANTED, "/etc/edge-gemma"}
DATA = {f"/var/{place}/edge-gemma" for place in ("lib", "lib/private", "cache", "cache/private")}
JOURNAL = "/var/lib/edge-gemma/journal.sqlite"
MODEL = "/var/lib/edge-gemma/bundles/1/manifest.json"
INSTALL_MODEL = f"mkdir /var/lib/edge-gemma/bundles/1; touch {MODEL}"


@pytest.mark.parametrize("steps", [(INSTALL, UPGRADE, UPGRADE, REMOVE, UPGRADE), (INSTALL, PURGE, INSTALL)])
def test_every_kind_of_installation_enables_the_unit(
    packages: Path, tmp_path: Path, steps: tuple[str, ...]
) -> None:
    assert left_after(packages, tmp_path, *steps) == CODE


def test_an_upgrade_leaves_a_disabled_unit_disabled(packages: Path, tmp_path: Path) -> None:
    assert WANTED not in left_after(packages, tmp_path, INSTALL, f"rm {WANTED}", UPGRADE)


def test_remove_leaves_data_and_a_masked_unit(packages: Path, tmp_path: Path) -> None:
    left = left_after(packages, tmp_path, INSTALL, RUN_ONCE, REMOVE)
    assert left == DATA | {JOURNAL, UNIT, WANTED, "/etc/edge-gemma"}


@pytest.mark.parametrize("steps", [(PURGE,), (REMOVE, PURGE)])
def test_purge_leaves_nothing(packages: Path, tmp_path: Path, steps: tuple[str, ...]) -> None:
    assert left_after(packages, tmp_path, INSTALL, RUN_ONCE, *steps) == set()


def test_purge_leaves_models_and_configuration(packages: Path, tmp_path: Path) -> None:
    configured = "touch /etc/edge-gemma/edge-daemon.toml"
    left = left_after(packages, tmp_path, INSTALL, RUN_ONCE, configured, INSTALL_MODEL, PURGE)
    assert left == {"/etc/edge-gemma", "/var/lib/edge-gemma", "/var/lib/private/edge-gemma", MODEL}
