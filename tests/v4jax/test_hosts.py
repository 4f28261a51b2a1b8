"""What processes that run one engine tell one another. tests/sharding/test_processes.py runs some."""

import pytest

from v4jax.inference import hosts
from v4jax.inference.grammar import Grammar
from v4jax.inference.hosts import Channel, Message, ProcessesDifferError
from v4jax.inference.requests import Request
from v4jax.inference.sampling import Sampling


class Store:
    """The key-value store of two processes, of which each waits for nothing."""

    def __init__(self):
        self.held: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.held
        self.held[key] = value

    def key_value_delete(self, key: str) -> None:
        del self.held[key]

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        return self.held[key]


@pytest.fixture
def channels():
    store = Store()
    return Channel(store, "name", 0, 2), Channel(store, "name", 1, 2), store


def request(**options) -> Request:
    return Request(7, [3, 4], Sampling(seed=2**32 - 1, logit_bias={5: -1.5}), (1, 9), **options)


def test_a_request_arrives_as_it_was_sent():
    sent = request(priority=-3, grammar=Grammar.regex("a+"))
    (arrived,) = Message.decoded(Message((sent,), (4,), "d").encoded()).new

    for name in ("number", "prompt", "sampling", "stop_ids", "priority", "grammar"):
        assert getattr(arrived, name) == getattr(sent, name), name


def test_messages_come_in_order_until_the_end(channels):
    leader, follower, _ = channels
    leader.send((request(),), ())
    leader.send((), (7,), is_end=True)

    assert [r.number for r in follower.receive().new] == [7]
    last = follower.receive()
    assert last.cancelled == [7] and last.is_end


def test_other_tokens_are_an_error(channels):
    leader, follower, _ = channels
    ours, theirs = request(tokens=[11, 12]), request(tokens=[11, 12])
    for _ in range(2):
        leader.send((), ())
        follower.receive()
        leader.add([ours])
        follower.add([theirs])
        ours.tokens.append(13)
        theirs.tokens.append(14)
    leader.send((), ())
    with pytest.raises(ProcessesDifferError, match=r"process 1 has read other tokens .* step 3"):
        follower.receive()


def test_what_all_have_received_is_removed(channels, monkeypatch):
    monkeypatch.setattr(hosts, "KEPT", 4)
    leader, follower, store = channels
    for _ in range(50):
        leader.send((), ())
        follower.receive()
        assert len(store.held) <= 4 * 3
