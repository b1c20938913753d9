"""What `store/link.py` says of a repeat: Redis did it, only the reply was lost, and the link does it once more."""

import pytest
import redis

from backends import SystemClock, open_backend
from backends.conformance.cases import COST, NETWORK, ROOMY, WHO, make_ask
from backends.store.link import Link


class LosesOneReply(redis.Connection):
    is_losing = False
    sent = b""

    def send_packed_command(self, command, **options):
        self.sent = b"".join(command)
        super().send_packed_command(command, **options)

    def read_response(self, *args, **options):
        reply = super().read_response(*args, **options)
        is_charge = (b"INCRBY" in self.sent or b"EVAL" in self.sent) and isinstance(reply, int | list)
        if LosesOneReply.is_losing and is_charge:
            LosesOneReply.is_losing = False
            self.disconnect()
            raise redis.ConnectionError("the reply is lost")
        return reply


@pytest.mark.parametrize(("name", "charged"), [("atomic", 1), ("watch", 1), ("multi", 2), ("legacy", 2)])
def test_a_repeat_after_a_lost_reply_charges_twice_only_where_that_is_said(redis_url, name, charged):
    link = Link(redis_url, clock=SystemClock(), connection_class=LosesOneReply)
    backend = open_backend(name, link)
    LosesOneReply.is_losing = True
    backend.reserve(make_ask("one", COST, ROOMY))
    assert not LosesOneReply.is_losing
    books = backend.books(ROOMY.budgets(WHO, NETWORK))
    assert max(use.spent_nanousd for use in books.uses) == charged * COST
    link.close()
