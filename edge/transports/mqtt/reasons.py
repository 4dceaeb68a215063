"""Why a broker refuses or ends a connection, and what to do about it, in words."""

from __future__ import annotations

import ssl

from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge.protocol.strict_json import printable

# Reason codes (MQTT 5, 2.4); the last are that it is not available, busy, or has reached a limit.
UNSUPPORTED_VERSION, CLIENT_ID_INVALID, SESSION_TAKEN_OVER = 0x84, 0x85, 0x8E
RETAIN_UNSUPPORTED, QOS_UNSUPPORTED = 0x9A, 0x9B
NO_ROOM = (0x88, 0x89, 0x97, 0x9F)
# Reasons to end the connection that lie in a message: malformed, not authorized, name of the topic, size,
# format of the payload, retained, quality of service (MQTT 5, 3.14.2.1).
BLAMED = (0x81, 0x87, 0x90, 0x95, 0x99, RETAIN_UNSUPPORTED, QOS_UNSUPPORTED)


def advice(reason: ReasonCode, properties: Properties | None, client_id: str) -> str:
    """Say what to do about a broker that refuses `client_id`, from reason and properties of its CONNACK."""
    elsewhere = getattr(properties, "ServerReference", None)
    if elsewhere is not None:
        return f"it names another broker: {printable(elsewhere, 200)}."
    if reason.value in NO_ROOM:
        return "it may be starting, or have too many clients."
    if reason.value in (RETAIN_UNSUPPORTED, QOS_UNSUPPORTED):
        return "it must take retained messages, and QoS 1."
    if reason.value == CLIENT_ID_INVALID:
        return f"it must let in a client that is named {client_id}."
    return "check user name, password and its access list."


def diagnose(error: OSError) -> tuple[str, str]:
    """Say why a broker can't be reached, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}", "set ca_file to its authority's."
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason}", "check that its port is the one with TLS, and the certificates."
    said = error.strerror or str(error)
    return f"can't be reached: {said}", "is it running, and are host and port right?"
