"""Topics of nodes: which node one belongs to, and which user a response topic."""

import pytest

from edge.protocol.topics import NodeTopics, node_of, user_of


@pytest.mark.parametrize(
    ("topic", "node"),
    [
        ("edge/v1/pump/status", "pump"),
        ("edge/v1/pump", "pump"),
        ("edge/v1", ""),
        ("edge/v10/pump/status", ""),
        ("sensors/pump/status", ""),
    ],
)
def test_the_node_of_a_topic(topic: str, node: str) -> None:
    assert node_of(topic) == node


@pytest.mark.parametrize(
    ("client", "user"),
    [
        ("mqtt:edge/v1/pump/reply/ann/1f3a/x", "mqtt:edge/v1/pump/reply/ann/"),
        ("mqtt:edge/v1/pump/reply/ann", "mqtt:edge/v1/pump/reply/ann"),
        ("mqtt:sensors/7/answer", "mqtt:sensors/7/answer"),
        ("serial:/dev/ttyUSB0", "serial:/dev/ttyUSB0"),
        ("route:edge/v1/pump/reply/ann/x", "route:edge/v1/pump/reply/ann/x"),
    ],
)
def test_response_topics_below_a_users_prefix_have_one_user(client: str, user: str) -> None:
    assert user_of(client) == user


def test_all_topics_of_a_node_are_below_its_name() -> None:
    topics = NodeTopics("pump")
    named = (topics.request, topics.cancel, topics.status, topics.health, topics.reply, topics.route("r"))
    assert all(node_of(topic) == "pump" for topic in named)
