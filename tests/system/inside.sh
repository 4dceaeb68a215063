#!/bin/bash
# Runs in the emulated machine: installs the package, tries all that a person would, removes it again.
set -uo pipefail
CONFIG=/etc/edge-gemma/edge-daemon.toml
ASK=(edge-ask --host 127.0.0.1 --node edge-node --username alice --password-file /root/alice --max-tokens 4)

seconds() { cut -d. -f1 /proc/uptime; }

step() {  # step TEXT COMMAND...: say what is tried; leave with the daemon's log if it fails
  local text=$1
  shift
  if output=$("$@" 2>&1); then
    echo "[$(seconds) s] ok: $text"
  else
    echo "[$(seconds) s] FAILED: $text: $*"
    echo "$output"
    journalctl --no-pager -n 60 -u edge-daemon -u mosquitto -o cat
    tail -n 20 /var/log/mosquitto/mosquitto.log
    systemctl status --no-pager edge-daemon
    echo "SYSTEM TEST FAILED"
    exit 1
  fi
}

state_is() { [ "$(systemctl show -P ActiveState edge-daemon)" = "$1" ]; }
property_is() { [ "$(systemctl show -P "$1" edge-daemon)" = "$2" ]; }
main_pid() { systemctl show -P MainPID edge-daemon; }
status_is() { grep -qE "^$1:\s+$2$" "/proc/$(main_pid)/status"; }
answers() { "$@" | grep -q .; }
differs() { [ "$(main_pid)" != "$1" ] && [ "$(main_pid)" != 0 ] && state_is active; }
is_no_user_of_passwd() { ! cut -d: -f3 /etc/passwd | grep -qx "$(stat -c %u "/proc/$(main_pid)")"; }
not() { ! "$@"; }
fails_with() { local wanted=$1; shift; "$@"; [ $? = "$wanted" ]; }
within() { local limit=$1; shift; for ((i = 0; i < limit; i++)); do "$@" && return; sleep 1; done; return 1; }

prepare_broker() {
  local share=/usr/share/edge-gemma/mosquitto user
  sh $share/make-certificates /etc/mosquitto/certificates localhost 127.0.0.1 || return
  for user in edge-node alice; do
    touch /etc/mosquitto/edge-passwords
    mosquitto_passwd -b /etc/mosquitto/edge-passwords $user secret-$user || return
  done
  mkdir -p /var/lib/mosquitto /run/mosquitto
  cp $share/edge-gemma.conf /etc/mosquitto/conf.d/ && cp $share/edge-gemma.acl /etc/mosquitto/ || return
  cd /etc/mosquitto || return
  chown -R mosquitto: /var/lib/mosquitto /var/log/mosquitto certificates edge-passwords edge-gemma.acl
  chmod 600 edge-passwords edge-gemma.acl || return
  printf secret-alice > /root/alice
  systemctl restart mosquitto
}

prepare_daemon() {
  install -d -m 700 /etc/credstore
  printf secret-edge-node > /etc/credstore/edge-gemma.mqtt-password
  sed 's/^threads.*/threads = 2/; s/^context.*/context = 128/' /usr/share/edge-gemma/boards/arm64.toml > $CONFIG
  cat >> $CONFIG <<END
tls = true
ca_file = "/etc/mosquitto/certificates/ca.crt"
username = "edge-node"
password_file = "mqtt-password"

[[serial]]
port = "/dev/ttyS0"
END
  sed -i '1i node = "edge-node"' $CONFIG
}

install_bundle() { edge-daemon bundle install --config $CONFIG "$1" > /root/bundle-name; }
activate_bundle() { edge-daemon bundle activate --config $CONFIG "$(cat /root/bundle-name)"; }

echo "[$(seconds) s] $(. /etc/os-release; echo "$PRETTY_NAME"), $(uname -m), $(systemctl --version | head -n 1)"
step "the package installs with its dependencies" dpkg -i /root/edge-gemma.deb
step "the unit is enabled" systemctl is-enabled edge-daemon
step "it does not run without a configuration" state_is inactive
step "systemd finds no mistake in the unit" systemd-analyze verify --man=no --recursive-errors=yes \
  /usr/lib/systemd/system/edge-daemon.service
if udevadm --help | grep -q '^ *verify'; then
  step "udev finds no mistake in the rules" udevadm verify /usr/lib/udev/rules.d/65-edge-gemma.rules
fi
step "the broker starts with the shipped configuration" prepare_broker
step "the daemon is configured" prepare_daemon
step "a bundle is installed" install_bundle /root/bundle
step "it is activated before the daemon runs" activate_bundle
step "the daemon starts and says that it is ready" systemctl start edge-daemon
step "it is active" state_is active
step "it is no user of /etc/passwd" is_no_user_of_passwd
step "it has no capabilities" status_is CapEff 0000000000000000
step "it can gain no privileges" status_is NoNewPrivs 1
step "its system calls are filtered" status_is Seccomp 2
step "an answer comes over MQTT with password and TLS" within 30 answers "${ASK[@]}" "The pump is"
step "a wrong password is refused" fails_with 6 edge-ask --host 127.0.0.1 --node edge-node --username alice "x"
step "an answer comes over the serial line" answers edge-ask --serial /dev/ttyS1 --max-tokens 4 "The pump is"
if edge-daemon doctor --help > /dev/null 2>&1; then
  step "the doctor finds no problem" edge-daemon doctor --config $CONFIG
fi
step "it says which bundle it has" answers edge-daemon bundle list --config $CONFIG
killed=$(main_pid)
kill -9 "$killed"
step "killed, it is there again" within 60 differs "$killed"
step "and answers" within 30 answers "${ASK[@]}" "The pump is"
step "it says that it is alive before the watchdog bites" sleep 70
step "it was not restarted meanwhile" property_is NRestarts 1
systemctl kill --signal=STOP edge-daemon
stopped=$(main_pid)
step "hung, the watchdog restarts it" within 120 differs "$stopped"
step "a clean stop takes its time only" systemctl stop edge-daemon
step "the package can be removed" dpkg -r edge-gemma
step "nothing of it is left to run" not test -e /usr/bin/edge-daemon -o -e /usr/lib/edge-gemma
step "models and configuration stay" test -e $CONFIG -a -e /var/lib/edge-gemma/bundles/current/manifest.json
step "it can be installed again" dpkg -i /root/edge-gemma.deb
step "and runs again by itself" state_is active
step "it can be purged" dpkg -P edge-gemma
step "its unit is no longer masked" not test -L /etc/systemd/system/edge-daemon.service
step "requests and packed weights are gone" not test -e /var/lib/edge-gemma/journal.sqlite -o -e /var/cache/edge-gemma
step "models and configuration are still there" test -e $CONFIG -a -e /var/lib/edge-gemma/bundles/current/manifest.json
echo "SYSTEM TEST PASSED after $(seconds) s"
