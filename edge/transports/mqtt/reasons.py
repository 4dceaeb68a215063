"""Names of MQTT 5 reason codes (2.4), and fixes for a broker that refuses or can't be reached."""

from __future__ import annotations

from edge.protocol.strict_json import printable

UNSUPPORTED_VERSION, CLIENT_ID_INVALID, MALFORMED_PACKET, SESSION_TAKEN_OVER = 0x84, 0x85, 0x81, 0x8E
RETAIN_UNSUPPORTED, QOS_UNSUPPORTED = 0x9A, 0x9B
NO_ROOM = (0x88, 0x89, 0x97, 0x9F)  # unavailable, busy, over a limit: a later attempt can succeed
# Reasons to disconnect that a message can cause: malformed, not authorized, topic name, size, payload
# format, retain, QoS (3.14.2.1).
BLAMED = (MALFORMED_PACKET, 0x87, 0x90, 0x95, 0x99, RETAIN_UNSUPPORTED, QOS_UNSUPPORTED)

_NAMES = {
    0x00: "Normal disconnection",
    0x04: "Disconnect with will message",
    0x80: "Unspecified error",
    0x81: "Malformed packet",
    0x82: "Protocol error",
    0x83: "Implementation specific error",
    0x84: "Unsupported protocol version",
    0x85: "Client identifier not valid",
    0x86: "Bad user name or password",
    0x87: "Not authorized",
    0x88: "Server unavailable",
    0x89: "Server busy",
    0x8A: "Banned",
    0x8B: "Server shutting down",
    0x8C: "Bad authentication method",
    0x8D: "Keep alive timeout",
    0x8E: "Session taken over",
    0x8F: "Topic filter invalid",
    0x90: "Topic name invalid",
    0x91: "Packet identifier in use",
    0x92: "Packet identifier not found",
    0x93: "Receive maximum exceeded",
    0x94: "Topic alias invalid",
    0x95: "Packet too large",
    0x96: "Message rate too high",
    0x97: "Quota exceeded",
    0x98: "Administrative action",
    0x99: "Payload format invalid",
    0x9A: "Retain not supported",
    0x9B: "QoS not supported",
    0x9C: "Use another server",
    0x9D: "Server moved",
    0x9E: "Shared subscriptions not supported",
    0x9F: "Connection rate exceeded",
    0xA0: "Maximum connect time",
    0xA1: "Subscription identifiers not supported",
    0xA2: "Wildcard subscriptions not supported",
}


def name(reason: int) -> str:
    """Return the name of a reason code; for one that is not in the standard, its number."""
    return _NAMES.get(reason, f"reason {reason:#04x}")


def is_failure(reason: int) -> bool:
    """Whether a reason code means failure (2.4)."""
    return reason >= 0x80


def advice(reason: int, other_server: str | None, client_id: str) -> str:
    """Return the fix for a broker that refuses `client_id`; `other_server` is its Server Reference."""
    if other_server is not None:
        return f"it names another broker: {printable(other_server, 200)}"
    if reason in NO_ROOM:
        return "it may be starting or have too many clients"
    if reason in (RETAIN_UNSUPPORTED, QOS_UNSUPPORTED):
        return "it must accept retained messages and QoS 1"
    if reason == CLIENT_ID_INVALID:
        return f"it must accept the client identifier {client_id}"
    return "check the user name, the password and the broker's access list"


def diagnose(error: OSError) -> tuple[str, str]:
    """Return the reason why a broker can't be reached, and the fix."""
    import ssl  # already loaded if TLS is used; otherwise imported only after a failure

    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {error.verify_message}",
            "set ca_file to the certificate of its authority",
        )
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason}", "check the certificates, and that the port is the TLS port"
    return (
        f"can't be reached: {error.strerror or error}",
        "check that it is running, and that host and port are right",
    )
