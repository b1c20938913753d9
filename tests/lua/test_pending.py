"""What is pending of an owner, by what it is charged to: written, counted, taken back, and swept."""

import pytest

from backends.records import THE_SIX, key_digest
from tests.lua.by_hand import (
    BY_NAME,
    COST,
    ID,
    LATER_US,
    NOW_S,
    NOW_US,
    OF_ALL,
    OF_NETWORK,
    OF_TEAM,
    OF_WHO,
    RESET,
    SIX,
    US,
    extend,
    for_ever,
    members_of,
    release,
    reserve,
    settle,
    spend,
    total,
    window,
)

ONE, OTHER, MINE, OURS = for_ever("one"), for_ever("other"), for_ever("mine", OF_WHO), total("ours", OF_ALL)
EVERY = (*SIX, ONE, MINE, OTHER)
D = {row.name: key_digest(row.key) for row in (ONE, OTHER, MINE, OURS)}
BUCKET_S, LASTS_S = 10, 130
OVER_S = NOW_S - LASTS_S
"""Where the youngest bucket begins that is over."""


def pending_of(client, *owners):
    return [members_of(client, owner) for owner in owners]


def test_what_is_charged_to_the_six_alone_is_under_the_start_of_its_bucket(client):
    reserve(client)
    assert pending_of(client, OF_WHO, OF_NETWORK, OF_ALL) == [{f"{NOW_S}": COST}] * 3


def test_what_is_charged_to_others_too_says_so_for_each_owner(client):
    reserve(client, rows=EVERY)
    assert pending_of(client, OF_WHO, OF_TEAM, OF_NETWORK, OF_ALL) == [
        {f"{NOW_S}:{THE_SIX}{D['mine']}": COST},
        {f"{NOW_S}:{D['one']}{D['other']}": COST},
        *[{f"{NOW_S}": COST}] * 2,
    ]
    reserve(client, "b", (OURS, MINE), cost=7)
    assert members_of(client, OF_ALL) == {f"{NOW_S}": COST, f"{NOW_S}:{D['ours']}": 7}
    assert members_of(client, OF_WHO) == {f"{NOW_S}:{THE_SIX}{D['mine']}": COST, f"{NOW_S}:{D['mine']}": 7}


@pytest.mark.parametrize("end", [settle, release])
def test_an_end_takes_it_back_from_what_it_was_charged_to(client, end):
    lists = {"both": (ONE, OTHER), "one": (ONE,), "other": (OTHER,), "six": EVERY}
    for number, (rid, rows) in enumerate(lists.items(), 1):
        reserve(client, rid, rows, cost=number)
    for rid, rows in lists.items():
        before = members_of(client, OF_TEAM)
        assert end(client, rid, rows=rows)[0] == 0
        digests = "".join(D[row.name] for row in rows if row.owner == OF_TEAM)
        at, number = f"{NOW_S}:{digests}", [*lists].index(rid) + 1
        left = {**before, at: before[at] - number}
        assert members_of(client, OF_TEAM) == {member: held for member, held in left.items() if held}
    assert pending_of(client, OF_TEAM, OF_WHO, OF_NETWORK, OF_ALL) == [{}] * 4


def test_an_end_takes_back_no_more_than_its_own(client):
    reserve(client, "a", (ONE, OTHER), cost=5)
    reserve(client, "b", (ONE, OTHER), cost=7)
    settle(client, "a", rows=(ONE, OTHER))
    assert members_of(client, OF_TEAM) == {f"{NOW_S}:{D['one']}{D['other']}": 7}


def test_an_extension_adds_to_what_it_was_charged_to(client):
    reserve(client, "other", (ONE,), cost=3)
    reserve(client, rows=(ONE, OTHER))
    assert extend(client, rows=(ONE, OTHER))[0] == 0
    assert members_of(client, OF_TEAM) == {f"{NOW_S}:{D['one']}": 3, f"{NOW_S}:{D['one']}{D['other']}": 2 * COST}
    reserve(client, "six", EVERY, cost=1)
    extend(client, "six", 5, EVERY)
    assert members_of(client, OF_WHO) == {f"{NOW_S}:{THE_SIX}{D['mine']}": 5}


def test_without_a_budget_that_is_known_no_more_it_is_found_all_the_same(client):
    """By what its record says. `ONE` alone would be another member, which others have."""
    reserve(client, "other", (ONE, MINE), cost=3)
    reserve(client, "six", (*SIX, ONE), cost=4)
    reserve(client, rows=(*SIX, ONE, OTHER, MINE))
    extend(client, rows=(*SIX, ONE))
    assert members_of(client, OF_TEAM)[f"{NOW_S}:{D['one']}{D['other']}"] == 2 * COST
    assert members_of(client, OF_WHO)[f"{NOW_S}:{THE_SIX}{D['mine']}"] == 2 * COST
    settle(client, rows=(*SIX, ONE))
    assert members_of(client, OF_TEAM) == {f"{NOW_S}:{D['one']}": 7}
    assert members_of(client, OF_WHO) == {f"{NOW_S}:{D['mine']}": 3, f"{NOW_S}": 4}


BESIDE = (
    f"{NOW_S}",
    f"{NOW_S}:{D['one']}",
    f"{NOW_S}:{D['mine']}",
    f"{NOW_S}:{THE_SIX}{D['mine']}xxxxxx",
    f"{NOW_S}:xxxxxx{D['one']}{D['other']}",
    f"{NOW_S}:{D['one']}xxxxxx{D['other']}",
    f"{NOW_S}:{D['one']}{D['other']}xxxxxx",
    f"{NOW_S - BUCKET_S}:{D['one']}{D['other']}",
    f"{NOW_S + BUCKET_S}:{D['one']}{D['other']}{D['mine']}",
)


@pytest.mark.parametrize("many", [1, 10**9])
@pytest.mark.parametrize("rows", [(ONE, OTHER), (*SIX, ONE, OTHER), (MINE,), (*SIX, MINE)])
def test_whatever_is_pending_beside_it_is_left_alone(client, rows, many):
    """Those that hold more come after it, and those that hold less before."""
    reserve(client, rows=rows)
    owner = rows[-1].owner
    (own,) = members_of(client, owner)
    beside = dict.fromkeys({*BESIDE, f"{NOW_S}:{THE_SIX}{D['mine']}"} - {own}, many)
    if SIX[0] not in rows:
        beside |= {f"{NOW_S}:{THE_SIX}{own.partition(':')[2]}": many}
    client.zadd(owner, beside)
    extend(client, rows=rows)
    assert members_of(client, owner) == beside | {own: 2 * COST}
    settle(client, rows=rows)
    assert members_of(client, owner) == beside


def test_what_is_late_takes_nothing_from_what_is_pending(client):
    reserve(client, rows=(ONE,))
    client.delete(f"llm:reservation:{ID}")
    assert settle(client, rows=(ONE,))[0] == 2
    assert members_of(client, OF_TEAM) == {f"{NOW_S}:{D['one']}": COST}


def test_what_a_version_before_wrote_makes_no_further_budget_busy(client):
    spend(client, rows=(ONE,))
    client.zadd(OF_TEAM, {f"{NOW_S}": COST})
    assert refusal_by(client, ONE, (ONE,)) == [0, 0]


@pytest.mark.parametrize("rows", [(ONE, OTHER), EVERY])
def test_what_a_version_before_wrote_says_nothing_and_ends_all_the_same(client, rows):
    reserve(client, rows=rows)
    owners = list(dict.fromkeys(row.owner for row in rows))
    for owner in owners:
        client.delete(owner)
        client.zadd(owner, {f"{NOW_S}": COST + 5})
    extend(client, rows=rows)
    assert pending_of(client, *owners) == [{f"{NOW_S}": 2 * COST + 5}] * len(owners)
    settle(client, rows=rows)
    assert pending_of(client, *owners) == [{f"{NOW_S}": 5}] * len(owners)


def test_what_was_cleared_is_in_nobodys_pending_money_again(client):
    rows = (*SIX, MINE)
    reserve(client, rows=rows)
    client.delete(OF_WHO)
    client.set(RESET, NOW_US, ex=1_000)
    reserve(client, "after", rows, cost=3, now_us=NOW_US + 1)
    extend(client, rows=rows)
    settle(client, rows=rows)
    assert members_of(client, OF_WHO) == {f"{NOW_S}:{THE_SIX}{D['mine']}": 3}


# --- busy, or spent


def refusal_by(client, row, rows, cost=COST, limit=COST):
    answer = reserve(client, "refused", rows, cost=cost, **{row.name: limit})
    assert (answer[0], answer[5]) == (row.status, 1 + [each.name for each in rows].index(row.name))
    return answer[3:5]


def test_a_budget_is_busy_by_what_it_is_charged_with_alone(client):
    reserve(client, rows=(ONE,))
    spend(client, rows=(ONE, OTHER))
    assert refusal_by(client, OTHER, (ONE, OTHER)) == [0, 0]
    assert refusal_by(client, ONE, (ONE, OTHER), limit=2 * COST) == [1, 1]
    # Wherever it stands in the list of a request that was.
    reserve(client, "b", (TODAY, OTHER))
    assert refusal_by(client, OTHER, (OTHER,), limit=2 * COST) == [1, 1]
    assert refusal_by(client, OTHER, (OTHER,), cost=COST + 1, limit=2 * COST) == [0, 0]


TODAY = total("today")


@pytest.mark.parametrize("name", [row.name for row in SIX])
def test_the_six_are_busy_by_what_they_are_charged_with_alone(client, name):
    row = BY_NAME[name]
    beside = for_ever("beside", row.owner)
    spend(client)
    reserve(client, rows=(beside,))
    assert refusal_by(client, row, SIX)[1] == 0
    client.delete("llm:throttle:hash456")
    reserve(client, "both", (*SIX, beside))
    assert refusal_by(client, row, SIX, limit=2 * COST)[1] == 1
    client.delete("llm:throttle:hash456")
    assert refusal_by(client, row, (beside, *SIX), cost=COST + 1, limit=2 * COST)[1] == 0


def test_of_many_each_is_counted_by_its_own_digest(client):
    rows = (*SIX, *(window(f"w{number}") for number in range(8)), *(total(f"t{number}") for number in range(8)))
    for row in rows[6:]:
        reserve(client, row.name, (row,))
    for row in rows[6:]:
        assert refusal_by(client, row, rows) == [1, 1]
        assert refusal_by(client, row, rows, cost=COST + 1, limit=COST + 1) == [1, 1]
        spend(client, f"{row.name} spent", 1, (row,))
        assert refusal_by(client, row, rows)[1] == 0


# --- what is over


def test_what_is_over_does_not_count_and_what_is_not_does(client):
    spend(client, rows=(ONE,))
    client.zadd(OF_TEAM, {f"{OVER_S}:{D['one']}": COST})
    assert refusal_by(client, ONE, (ONE,)) == [0, 0]
    client.zadd(OF_TEAM, {f"{OVER_S + 1}:{D['one']}": COST})
    assert refusal_by(client, ONE, (ONE,)) == [1, 1]


def test_an_end_sweeps_what_is_over_whatever_it_is_charged_to(client):
    reserve(client, rows=(OURS,))
    left = {f"{OVER_S + 1}": 1, f"{OVER_S + 1}:{D['one']}": 2}
    later_s = OVER_S + (LATER_US - NOW_US) // US
    over = {f"{later_s - 1}:{D['ours']}": 10, f"{later_s - 1}": 20, "by hand": 40, f"{later_s - 1}:by hand": 80}
    client.zadd(OF_ALL, {f"{int(at[:10]) + 1}{at[10:]}": held for at, held in left.items()} | over)
    assert settle(client, rows=(OURS,))[3] == 150
    assert members_of(client, OF_ALL) == {f"{OVER_S + 2}": 1, f"{OVER_S + 2}:{D['one']}": 2}


def test_a_new_member_sweeps_what_is_over_and_nothing_that_counts(client):
    counts = {f"{OVER_S + 1}:{number:06}": number for number in range(1, 30)}
    over = {f"{OVER_S}:{D['ours']}": 100, f"{OVER_S}": 200, f"{OVER_S - 1}:{THE_SIX}{D['ours']}": 400}
    client.zadd(OF_ALL, counts | over)
    assert reserve(client, rows=(OURS,))[5] == 700
    assert members_of(client, OF_ALL) == counts | {f"{NOW_S}:{D['ours']}": COST}
    client.zadd(OF_ALL, over)
    assert reserve(client, "b", (OURS,))[5] == 0
    assert reserve(client, "c")[5] == 700
    assert members_of(client, OF_ALL) == counts | {f"{NOW_S}:{D['ours']}": 2 * COST, f"{NOW_S}": COST}


def test_many_lists_side_by_side_make_no_key_grow(client):
    """Nobody ends: of each list there are as many members as may count, and no more once a new one has come."""
    lists, number, most = [(OURS,), SIX, (*SIX, OURS), (*SIX, for_ever("theirs", OF_ALL))], 0, 0
    for turn in range(60):
        for rows in lists:
            number += 1
            now_us = NOW_US + turn * 7 * US
            reserve(client, f"r{number}", rows, now_us=now_us, from_s=0, until_s=2**40)
            starts = [int(member[:10]) for member in members_of(client, OF_ALL)]
            most = max(most, len(starts))
            assert len(set(starts)) <= 14
    assert 14 < most <= 14 * len(lists)


def test_where_one_owner_takes_no_more_the_others_get_back_what_they_had(client):
    rows = (ONE, MINE, OURS)
    reserve(client, "before", (ONE,), cost=3)
    reserve(client, "same", (MINE,), cost=4)
    client.set(OF_ALL, "by hand")
    before = pending_of(client, OF_TEAM, OF_WHO)
    with pytest.raises(Exception, match="WRONGTYPE"):
        reserve(client, rows=rows)
    assert pending_of(client, OF_TEAM, OF_WHO) == before
    with pytest.raises(Exception, match="WRONGTYPE"):
        reserve(client, rows=(ONE, OTHER, OURS))
    assert pending_of(client, OF_TEAM, OF_WHO) == before
    assert not client.exists(f"llm:reservation:{ID}")
