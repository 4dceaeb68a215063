"""The MQTT topics of a node: the one place that spells them."""

from __future__ import annotations

import copy
import re

ROOT = "edge/v1"
STATUS_OF_ALL = f"{ROOT}/+/status"


class NodeTopics:
    """Topics of one node; `+` as its name makes filters for all nodes."""

    def __init__(self, node: str) -> None:
        self.base = f"{ROOT}/{node}"
        self.request = f"{self.base}/request"
        self.cancel = f"{self.base}/cancel"
        self.status = f"{self.base}/status"
        self.health = f"{self.base}/health"
        self.reply = f"{self.base}/reply/"
        """Prefix of the response topics that every client may use."""

    def of_user(self, user: str) -> NodeTopics:
        """Give the same topics with those for requests and cancellations that only `user` may write to.

        `+` as the user makes filters for all users.
        """
        topics = copy.copy(self)
        topics.request, topics.cancel = f"{self.request}/{user}", f"{self.cancel}/{user}"
        topics.reply = f"{self.reply}{user}/"
        return topics

    def route(self, name: str) -> str:
        """Return the topic that shows a route's latest answer."""
        return f"{self.base}/routes/{name}"

    def sensor(self, route: str, name: str) -> str:
        """Give the topic that shows one sensor of a route; no route's name has a dot."""
        return f"{self.base}/routes/{route}.{name}"


def node_of(topic: str) -> str:
    """Give the node that a topic belongs to, or "" if it belongs to none."""
    root, _, rest = topic[len(ROOT) :].partition("/")
    return rest.partition("/")[0] if topic.startswith(ROOT) and not root else ""


def user_of(client: str) -> str:
    """Give the user that a client of the engine is of: what stands before the response topics' last levels.

    A broker's access list lets a user read below `reply/<user>/` only, so its response topics have one user.
    Any other client, such as another response topic or a serial port, is its own.
    """
    user = _USER.match(client)
    return client if user is None else user[0]


_USER = re.compile(rf"mqtt:{ROOT}/[^/]+/reply/[^/]+/")
