"""The suites can fail: each of these small wrongs in a script is noticed by the case that is named beside it.

A case is one of the published suite, or one of the tests beside this one, which know the scripts by their heads alone.
"""

import hashlib
from itertools import product

import pytest

from backends.conformance.harness import RedisHarness
from backends.conformance.redis_layout import RedisLayout
from backends.store.scripts import Script
from backends.strategies import atomic
from tests.lua import (
    by_hand,
    test_bounds,
    test_budgets,
    test_pending,
    test_replies,
    test_running,
    test_shares,
    test_wrong_kinds,
)

# What stands in the script, what is put in its place, and the case that notices.
RESERVE = [
    (
        "(%x%x%x%x%x%x%x%x)%x*",
        "(%x+)",
        "a_record_of_a_version_before_is_said_again_extended_and_ended",
    ),
    ("if now_us > tonumber(ARGV[2]) then", "if false then", "past_the_deadline_nothing_is_written"),
    (
        "if now_us > tonumber(ARGV[2]) then",
        "if now_us >= tonumber(ARGV[2]) then",
        "the_same_id_again_comes_before_a_marker_and_a_callers_key",
    ),
    ("if now_s < tonumber(from_s) or now_s >=", "if now_s >=", "with_the_keys_of_other_periods_nothing_is_written"),
    (
        "if now_s < tonumber(from_s) or",
        "if now_s <= tonumber(from_s) or",
        "the_first_and_the_last_moment_of_a_period_are_in_it",
    ),
    ("or now_s >= tonumber(until_s) then", "then", "with_the_keys_of_other_periods_nothing_is_written"),
    (
        "or now_s >= tonumber(until_s) then",
        "or now_s > tonumber(until_s) then",
        "with_the_keys_of_other_periods_nothing_is_written",
    ),
    ("now_us = time[1] * SECOND + time[2]", "now_us = time[1] * SECOND", "by_the_servers_own_time"),
    ("ceil(window_s / 20)", "ceil(window_s / 19)", "the_known_layout_of_keys"),
    (
        "ceil(window_s / 20)",
        "floor(window_s / 20)",
        "a_window_that_is_no_multiple_of_its_buckets_is_as_long_as_it_says",
    ),
    ("ceil(pending_s / 12)", "ceil(pending_s / 11)", "the_known_layout_of_keys"),
    ("ceil(pending_s / 12)", "floor(pending_s / 12)", "pending_money_has_buckets_of_a_twelfth_rounded_up"),
    (
        "floor(now_us / SECOND - lasts_s)",
        "floor(now_us / SECOND - lasts_s) + 1",
        "pending_money_counts_as_long_as_it_may_end_in_time",
    ),
    (
        "floor(now_us / SECOND - lasts_s)",
        "0",
        "pending_money_never_grows_though_nobody_settles",
    ),
    (
        "    if start >= since_text then\n",
        "    if true then\n",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "if start < oldest then oldest",
        "if true then oldest",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "if start < oldest then oldest",
        "if start > oldest then oldest",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    ("over_total + held", "over_total", "reservations_report_expired_amounts_where_no_request_settles"),
    (
        "format('%.0f', now_s - now_s % bucket_s)",
        "format('%.0f', now_s)",
        "a_ttl_is_set_with_a_new_bucket_or_a_first_amount_only",
    ),
    (
        "local text = texts[number] or call('GET', KEYS[1 + number])",
        "local text = texts[number]",
        "reserve_with_a_key_of_another_kind",
    ),
    ("not find(text, '^%d+$') or #text", "#text", "an_error_names_the_place_and_no_key"),
    (" or #text > 16) then error('KEYS", " or #text > 17) then error('KEYS", "an_error_names_the_place_and_no_key"),
    (
        "error('KEYS ' .. 1 + number .. ' holds no amount')",
        "error(KEYS[1 + number] .. ' holds no amount')",
        "an_error_names_the_place_and_no_key",
    ),
    (
        "fits and spent[number] + cost <= limits[number]",
        "fits and spent[number] <= limits[number]",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    (
        "fits and spent[number] + cost <= limits[number]",
        "fits and spent[number] + cost <= limits[number] + 1",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    (
        "fits and spent[number] + cost <= limits[number]",
        "fits and (number == 1 or spent[number] + cost <= limits[number])",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    (
        "fits and spent[number] + cost <= limits[number]",
        "(number == BUDGETS and fits or spent[number] + cost <= limits[number])",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    (
        "spent[number] = windows[number].total",
        "spent[number] = 0",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    ("reply[8 + i] = spent[i] + more", "reply[8 + i] = spent[i]", "each_budget_tells_what_it_has_itself"),
    (
        "(tonumber(windows[i].oldest) or tonumber(windows[i].bucket))",
        "(tonumber(windows[i].oldest) or now_s)",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "tonumber(windows[i].bucket)) + windows[i].lasts_s",
        "tonumber(windows[i].bucket)) + windows[i].lasts_s - windows[i].bucket_s",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    ("if record then", "if false then", "the_same_id_sent_again_charges_once_and_gets_the_first_answer"),
    (
        "  if known_digest ~= ARGV[5] then return { 9, 0, now_us } end\n",
        "",
        "an_id_of_another_request_or_one_that_has_ended_is_a_conflict",
    ),
    (
        "if state ~= 'open' then return { 8,",
        "if false then return { 8,",
        "an_id_of_another_request_or_one_that_has_ended_is_a_conflict",
    ),
    (
        "return { 8, 0, now_us, tonumber(nanousd) }",
        "return { 8, 0, now_us, cost }",
        "an_id_that_has_ended_and_one_for_another_request",
    ),
    (
        "return admitted(tonumber(match(its, '^%d+ (%d+)')),",
        "return admitted(pending_s,",
        "the_same_id_again_is_told_when_it_was_made_and_what_it_is_charged_to",
    ),
    (
        "tonumber(made_at_us), tonumber(nanousd), 0, '', its, 0)",
        "tonumber(made_at_us), cost, 0, '', its, 0)",
        "what_was_extended_is_found_with_what_it_holds",
    ),
    (
        "tonumber(made_at_us), tonumber(nanousd), 0, '', its, 0)",
        "now_us, tonumber(nanousd), 0, '', its, 0)",
        "the_same_id_again_is_told_when_it_was_made_and_what_it_is_charged_to",
    ),
    (
        "tonumber(made_at_us), tonumber(nanousd), 0, '', its, 0)",
        "tonumber(made_at_us), tonumber(nanousd), 0, '', ARGV[9], 0)",
        "the_same_id_again_is_told_when_it_was_made_and_what_it_is_charged_to",
    ),
    (
        "tonumber(made_at_us), tonumber(nanousd), 0, '', its, 0)",
        "tonumber(made_at_us), tonumber(nanousd), 0, '', its, cost)",
        "also_by_the_same_id_again",
    ),
    ("if known then\n  -- A text", "if false then\n  -- A text", "a_key_in_flight_settled_and_on_another_body"),
    ("state == 'settled' and 2", "state == 'settled' and 1", "a_key_in_flight_settled_and_on_another_body"),
    (
        "tonumber(until_us) <= now_us) and 3",
        "tonumber(until_us) < now_us) and 3",
        "the_key_of_a_request_that_did_not_end_in_time_is_expired",
    ),
    ("its_body == body and 1 or 0", "1", "a_key_set_by_hand_stands_for_an_unknown_request"),
    ("tonumber(nanousd or 0), its_body", "0, its_body", "a_callers_key"),
    ("its_rid or '' }", "'' }", "a_callers_key"),
    (
        "body and call('GET', KEYS[#KEYS])",
        "body and call('MGET', KEYS[#KEYS])[1]",
        "reserve_with_a_key_of_another_kind",
    ),
    ("if marker then", "if false then", "under_a_marker_everything_is_refused_with_what_set_it"),
    ("MARKER and call('GET', MARKER)", "MARKER and call('MGET', MARKER)[1]", "reserve_with_a_key_of_another_kind"),
    (
        "'^([%w_:]+) (%d+) (%d+) (%a+)$'",
        "'^([%w_]+) (%d+) (%d+) (%a+)$'",
        "the_identifier_and_everybody_are_told_by_their_numbers",
    ),
    ("ceil((until_us - now_us) / SECOND)", "floor((until_us - now_us) / SECOND)", "under_a_marker"),
    ("elseif left_s > 0 then", "elseif left_s >= 0 then", "under_a_marker"),
    ("elseif left_s > 0 then", "else", "under_a_marker"),
    ("max(left_s, ceil((ends_at_us - now_us) / SECOND))", "left_s", "the_marker_of_a_further_budget_and_its_cause"),
    ("ends_at_us ~= '0' and max", "max", "a_marker_ends_though_what_set_it_never_does"),
    ("busy == 'busy' and 1 or 0, cause }", "0, cause }", "busy_sets_the_marker_where_mark_when_busy_is_set"),
    (
        "planned(i).marker_s > 0 and math.min",
        "math.min",
        "a_marker_by_hand_lasts_as_long_as_the_shortest_that_a_budget_sets",
    ),
    ("math.min(shortest_s, planned(i).marker_s) or", "planned(i).marker_s or", "a_marker_set_by_hand"),
    (
        "shortest_s < NEVER_S and shortest_s or 1",
        "1",
        "a_marker_by_hand_lasts_as_long_as_the_shortest_that_a_budget_sets",
    ),
    ("left_ms >= 0 and ceil(left_ms / 1000) or", "", "a_marker_set_by_hand"),
    (
        "tonumber(limit) or math.huge",
        "tonumber(limit) or 0",
        "without_a_limit_there_is_always_room",
    ),
    ("  for i = 1, OWNERS do call('ZCARD', KEYS[PENDING + i]) end\n", "", "reserve_with_a_key_of_another_kind"),
    (
        "pending_bucket_s - 1 or planned(number).start_s",
        "pending_bucket_s - 1 or 0",
        "pending_money_of_yesterday_is_not_in_the_limit_of_today",
    ),
    (
        "now_s - window.lasts_s + window.bucket_s + pending_bucket_s - 1 or",
        "0 or",
        "a_pending_reservation_that_has_left_a_short_window_makes_nothing_busy",
    ),
    (
        "now_s - window.lasts_s + window.bucket_s + pending_bucket_s - 1 or",
        "now_s - window.lasts_s + window.bucket_s + pending_bucket_s or",
        "pending_money_that_may_have_left_a_short_window_makes_it_not_busy",
    ),
    (
        "read_buckets({}, planned(number).pending",
        "read_buckets({}, planned(1).pending",
        "busy_is_what_the_pending_money_of_its_own_owner_alone_makes_of_it",
    ),
    ("local is_in = member >= pending.since_text and", "local is_in =", "a_pending_reservation_past_its_time_is_spent"),
    (
        "+ pending_bucket_s > since_s",
        "+ pending_bucket_s >= since_s",
        "pending_money_that_may_have_left_a_short_window_makes_it_not_busy",
    ),
    (
        "+ pending_bucket_s > since_s",
        "+ 0 > since_s",
        "pending_money_that_may_have_left_a_short_window_makes_it_not_busy",
    ),
    (
        "planned(number).end_s > 0 and planned(number).end_s or NEVER_S",
        "planned(number).end_s",
        "waiting_never_helps_where_what_never_ends_is_spent",
    ),
    (
        "if window.flat[i] >= window.since_text then live",
        "if true then live",
        "a_refusal_ends_when_enough_has_left_the_window",
    ),
    (
        "    table.sort(live, function(one, other) return one.start < other.start end)\n",
        "",
        "retry_after_is_never_early_and_at_most_a_bucket_late",
    ),
    (
        "if left + cost > limits[number] then left",
        "if left + cost >= limits[number] then left",
        "what_is_refused_at_the_least_is_waited_for_at_the_least",
    ),
    (
        "if left + cost > limits[number] then left",
        "if true then left",
        "retry_after_is_never_early_and_at_most_a_bucket_late",
    ),
    (
        "bucket.start + window.lasts_s end",
        "bucket.start + window.lasts_s - window.bucket_s end",
        "retry_after_is_never_early_and_at_most_a_bucket_late",
    ),
    ("if not planned(i).is_shadow then", "if true then", "a_shadow_budget_without_room_is_told_by_the_buckets"),
    (
        "room, never_fits = math.min(room, left)",
        "room, never_fits = left",
        "the_last_of_the_fullest_budget_is_what_is_left",
    ),
    ("never_fits or cost > left_of(", "cost > left_of(", "what_can_never_fit"),
    (
        "never_fits or cost > left_of(",
        "never_fits or cost >= left_of(",
        "the_first_that_fails_is_told_and_the_latest_end",
    ),
    (
        "if cost > left then\n",
        "if cost >= left then\n",
        "less_than_all_where_that_will_do",
    ),
    ("refusing = refusing or bound", "refusing = bound", "the_first_limit_that_fails_is_the_reason"),
    ("busy = busy and cost", "busy = cost", "where_one_limit_is_busy_and_another_spent_it_is_not_called_busy"),
    (
        "cost <= left_of(bound, once_pending_has_ended)",
        "cost < left_of(bound, once_pending_has_ended)",
        "where_one_is_busy_and_another_spent_it_is_not_busy",
    ),
    (
        "cost <= left_of(bound, once_pending_has_ended)",
        "0 <= left_of(bound, once_pending_has_ended)",
        "the_shortest_marker_is_of_a_second",
    ),
    ("spent[number] - pending_in(number)", "spent[number]", "what_its_owner_holds_makes_a_share_busy"),
    (
        "ends_at_s = max(ends_at_s, fits_at_s(bound.number))",
        "ends_at_s = fits_at_s(bound.number)",
        "the_marker_of_a_further_budget_and_its_cause",
    ),
    (
        "ends_at_s = max(ends_at_s, fits_at_s(bound.number))",
        "ends_at_s = ends_at_s > 0 and ends_at_s or fits_at_s(bound.number)",
        "the_first_that_fails_is_told_and_the_latest_end",
    ),
    (
        "if refusing and not busy and ARGV[4]",
        "if refusing and ARGV[4]",
        "while_what_is_under_way_may_make_room_for_all_of_it_no_less_is_set_aside",
    ),
    (
        "if refusing and not busy and ARGV[4]",
        "if false and ARGV[4]",
        "the_last_of_a_budget_is_set_aside_where_that_will_do",
    ),
    ("    cost = tonumber(ARGV[4])\n", "", "the_last_of_a_budget_is_set_aside_where_that_will_do"),
    (
        "    cost = tonumber(ARGV[4])\n    check_all()",
        "    refusing = nil",
        "less_than_will_do_is_refused_and_nothing_is_set_aside",
    ),
    (
        "then cost, cost_text = room, format('%.0f', room) end",
        "then cost_text = format('%.0f', room) end",
        "the_last_of_the_fullest_budget_is_what_is_left",
    ),
    (
        "then cost, cost_text = room, format('%.0f', room) end",
        "then cost = room end",
        "the_last_of_a_budget_is_set_aside_where_that_will_do",
    ),
    (
        "cost_text = room, format('%.0f', room)",
        "cost_text = room, format('%.14g', room)",
        "amounts_of_sixteen_digits_are_written_whole",
    ),
    ("(busy or never_fits) and 1 or", "busy and 1 or", "the_marker_of_what_can_never_fit_ends_by_itself"),
    (
        "(busy or never_fits) and 1 or",
        "never_fits and 1 or",
        "what_is_pending_counts_in_what_never_ends_whenever_it_was_made",
    ),
    ("ends_at_s == NEVER_S and 0 or", "", "waiting_never_helps_where_what_never_ends_is_spent"),
    (
        "max(1, ceil(ends_at_s - now_us / SECOND))",
        "max(1, floor(ends_at_s - now_us / SECOND))",
        "what_is_refused_at_the_least_is_waited_for_at_the_least",
    ),
    ("(busy and ARGV[7] ~= '1') and 0 or", "", "a_pending_reservation_past_its_time_is_spent"),
    ("(busy and ARGV[7] ~= '1') and 0 or", "ARGV[7] ~= '1' and 0 or", "busy_without_a_marker"),
    ("wait_s = wait_s > 0 and max(wait_s, marker_s) or 0", "", "busy_sets_the_marker_where_mark_when_busy_is_set"),
    (
        "wait_s = wait_s > 0 and max(wait_s, marker_s) or 0",
        "wait_s = max(wait_s, marker_s)",
        "a_marker_ends_though_what_set_it_never_does",
    ),
    (
        "wait_s > 0 and now_us + wait_s * SECOND or 0,",
        "now_us + wait_s * SECOND,",
        "a_marker_ends_though_what_set_it_never_does",
    ),
    (
        "now_us + marker_s * SECOND, wait_s",
        "now_us + wait_s * SECOND, wait_s",
        "the_record_and_the_marker_are_written_as_the_head_of_the_script_says",
    ),
    (
        "busy and 'busy' or 'spent'), 'EX', marker_s)",
        "busy and 'busy' or 'spent'), 'EX', wait_s)",
        "a_refused_request_changes_nothing_but_the_marker",
    ),
    ("busy and 'busy' or 'spent'), 'EX'", "'spent'), 'EX'", "busy"),
    (
        "return { refusing.status, marker_s, now_us, wait_s, busy and 1 or 0, refusing.number }",
        "return { refusing.status, marker_s, now_us, wait_s, busy and 1 or 0, refusing.status - 1 }",
        "the_shortest_marker_is_of_a_second",
    ),
    (
        "if spent[i] + cost > limits[i] then without_room",
        "if spent[i] + cost >= limits[i] then without_room",
        "less_than_all_where_that_will_do",
    ),
    (
        "redis.pcall('ZINCRBY', KEYS[PENDING + i], cost_text",
        "call('ZINCRBY', KEYS[PENDING + i], cost_text",
        "pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were",
    ),
    (
        "if type(held) == 'table' then",
        "if false then",
        "pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were",
    ),
    (
        "for j = 1, i - 1 do",
        "for j = 1, i - 2 do",
        "pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were",
    ),
    (
        "for j = 1, i - 1 do",
        "for j = 2, i - 1 do",
        "pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were",
    ),
    (
        "if is_new[j] then call('ZREM', key, members[j]) else",
        "if not is_new[j] then",
        "pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were",
    ),
    (
        "call('ZINCRBY', key, -cost, members[j]) end",
        "end",
        "pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were",
    ),
    (
        "    return held\n  end\n  is_new",
        "  end\n  is_new",
        "pending_money_that_refuses_leaves_the_buckets_of_the_others_as_they_were",
    ),
    ("is_new[i] = tonumber(held) == cost", "is_new[i] = true", "pending_amounts_get_their_ttl_with_a_new_bucket_only"),
    ("is_new[i] = tonumber(held) == cost", "is_new[i] = false", "the_known_layout_of_keys"),
    (
        "(i == EVERYBODY and RECORD_KEEP_S or 0))\n    if call",
        "0)\n    if call",
        "expired_amounts_are_reported_after_an_hour_without_requests",
    ),
    (
        "pending_s + pending_bucket_s + (i == EVERYBODY and RECORD_KEEP_S or 0))\n    if call",
        "pending_s + (i == EVERYBODY and RECORD_KEEP_S or 0))\n    if call",
        "the_known_layout_of_keys",
    ),
    (
        "> LIVE_PENDING_BUCKETS + 1 then",
        "> LIVE_PENDING_BUCKETS then",
        "what_killed_workers_leave_pending_makes_no_set_grow_and_is_reported_when_it_is_removed",
    ),
    (
        "> LIVE_PENDING_BUCKETS + 1 then",
        "> LIVE_PENDING_BUCKETS + 2 then",
        "what_killed_workers_leave_pending_makes_no_set_grow_and_is_reported_when_it_is_removed",
    ),
    (
        "if pending.over then call('ZREM', key, unpack(pending.over)) end",
        "",
        "what_killed_workers_leave_pending_makes_no_set_grow_and_is_reported_when_it_is_removed",
    ),
    (
        "if pending.over then call('ZREM'",
        "if true then call('ZREM'",
        "as_much_pending_money_as_counts_is_left_where_it_is",
    ),
    (
        "if i == EVERYBODY then expired = pending.over_total end",
        "",
        "reservations_report_expired_amounts_where_no_request_settles",
    ),
    (
        "if i == EVERYBODY then expired = pending.over_total end",
        "expired = expired + pending.over_total",
        "reservations_report_expired_amounts_where_no_request_settles",
    ),
    (
        "if i == EVERYBODY then expired = pending.over_total end",
        "expired = pending.over_total",
        "what_is_swept_of_everybody_is_reported_whatever_their_place_is",
    ),
    (
        "ARGV[5], ARGV[6]), 'EX', pending_s + RECORD_KEEP_S",
        "ARGV[5], ARGV[6]), 'EX', pending_s",
        "the_known_layout_of_keys",
    ),
    (
        "format('open %s %.0f %s %s', cost_text, now_us, ARGV[5]",
        "format('open %s %.0f %s %s', ARGV[6], now_us, ARGV[5]",
        "the_last_of_a_budget_is_set_aside_where_that_will_do",
    ),
    ("now_us + pending_s * SECOND), 'EX'", "now_us), 'EX'", "an_extension_leaves_the_key_of_another_request_alone"),
    (
        "cost_text, now_us + pending_s * SECOND)",
        "ARGV[6], now_us + pending_s * SECOND)",
        "the_last_of_a_budget_is_set_aside_where_that_will_do",
    ),
    ("'EX', IDEMPOTENCY_KEEP_S)", "'EX', pending_s)", "the_key_of_a_request_that_did_not_end_in_time_is_expired"),
    (
        "    call('INCRBY', key, cost_text)",
        "    if i < BUDGETS then call('INCRBY', key, cost_text) end",
        "scopes_are_kept_apart",
    ),
    (
        "if spent[i] == 0 and planned(i).keep_until_s > 0 then",
        "if planned(i).keep_until_s > 0 then",
        "a_reservation_prolongs_a_ttl_with_a_new_bucket_only",
    ),
    (
        "if spent[i] == 0 and planned(i).keep_until_s > 0 then",
        "if spent[i] == 0 then",
        "without_a_limit_all_is_booked_and_nothing_refused",
    ),
    ("if spent[i] == 0 and planned(i).keep_until_s > 0 then", "if false then", "the_known_layout_of_keys"),
    ("planned(i).keep_until_s - now_s)", "planned(i).end_s - now_s)", "the_known_layout_of_keys"),
    (
        "call('EXPIRE', key, window.lasts_s)",
        "call('EXPIRE', key, window.lasts_s - window.bucket_s)",
        "the_known_layout_of_keys",
    ),
    (
        "    if not present then\n      call('EXPIRE'",
        "    if true then\n      call('EXPIRE'",
        "a_window_outlasts_its_youngest_bucket",
    ),
    ("      call('EXPIRE', key, window.lasts_s)\n", "", "a_ttl_is_set_with_a_new_bucket_or_a_first_amount_only"),
    (
        "elseif call('PTTL', key) < left_ms then",
        "elseif false then",
        "a_window_that_grows_forgets_nothing_that_was_booked_since",
    ),
    (
        "elseif call('PTTL', key) < left_ms then",
        "else",
        "a_window_outlasts_its_youngest_bucket",
    ),
    (
        "call('PEXPIRE', key, format('%.0f', left_ms))",
        "call('EXPIRE', key, ttl_s)",
        "a_window_outlasts_its_youngest_bucket",
    ),
    (
        "(window.bucket + window.lasts_s) * 1000 - floor(now_us / 1000)",
        "window.lasts_s * 1000",
        "a_window_outlasts_its_youngest_bucket",
    ),
    (
        "    if window.over then call('ZREM', key, unpack(window.over)) end\n",
        "",
        "a_window_has_never_more_members_than_buckets_and_one",
    ),
    (
        "return admitted(pending_s, now_us, cost, expired, without_room, '', cost)",
        "return admitted(pending_s, now_us, cost, 0, without_room, '', cost)",
        "reservations_report_expired_amounts_where_no_request_settles",
    ),
    (
        "return admitted(pending_s, now_us, cost, expired, without_room, '', cost)",
        "return admitted(pending_s, now_us, cost, expired, '', '', cost)",
        "a_shadow_budget_without_room_is_told_by_the_buckets",
    ),
]
RUNNING_TEXTS = [
    ("local head = window_s ..", "local head = 600 ..", "the_window_may_grow_and_shrink"),
    (
        "match(hint or '', '^' .. head ..",
        "match(hint or '', '^' .. window_s .. ' %d+' ..",
        "a_text_of_something_else",
    ),
    ("'^' .. head .. ' (%d+)", "'^%d+ %d+' .. ' (%d+)", "a_text_of_something_else"),
    ("' (%d+) (%d+) (%d+)$')\n  local is_usable", "' (%d+) (%d+) (%d+)')\n  local is_usable", "a_text_by_hand"),
    ("'^' .. head .. ' (%d+)", "head .. ' (%d+)", "a_text_by_hand"),
    ("buckets and oldest + lasts_s > now_us / SECOND and", "buckets and", "a_text_of_something_else"),
    ("oldest + lasts_s > now_us", "oldest + lasts_s >= now_us", "a_bucket_that_goes_over_within_the_present_one"),
    ("oldest + lasts_s > now_us", "oldest + window_s > now_us", "a_bucket_that_goes_over_within_the_present_one"),
    ("and call('ZCARD', key) == tonumber(buckets)\n", "\n", "what_was_changed_by_hand_is_read_anew"),
    (
        "is_usable and call('ZSCORE', key, bucket)",
        "is_usable and (call('ZSCORE', key, bucket) or 0)",
        "what_was_changed_by_hand_is_read_anew",
    ),
    ("is_usable and call('ZSCORE', key, bucket)", "is_usable and cost", "with_what_the_present_bucket_holds_by_now"),
    ("return present and window or read", "return read", "a_text_that_may_be_believed_is"),
    ("present and others + present", "present and tonumber(others)", "a_text_that_may_be_believed_is"),
    ("present and others + present", "present and tonumber(present)", "a_text_that_may_be_believed_is"),
    ("oldest = oldest }", "oldest = bucket }", "also_by_the_same_id_again"),
    (
        "is_known = present and true",
        "is_known = false",
        "a_window_is_not_read_while_what_it_came_to_is_known",
    ),
    ("KEYS[1 + hints], texts[hints])", "KEYS[1 + hints], texts[BUDGETS + 1])", "of_many_windows_each_has_its_own"),
    ("KEYS[1 + hints], texts[hints])", "KEYS[2 + BUDGETS], texts[hints])", "of_many_windows_each_has_its_own"),
    ("    if window.is_known then spent[i]", "    if false then spent[i]", "what_can_never_fit"),
    (
        "#flat / 2 - (over and #over or 0), false",
        "#flat / 2 - (over and #over or 0), found.is_known",
        "what_says_too_much_refuses_nobody",
    ),
    ("#flat / 2 - (over and #over or 0)", "#flat / 2", "what_a_charge_leaves_of_a_window_that_was_there"),
    (
        "if start == found.bucket then found.present = held end",
        "found.present = held",
        "what_a_charge_that_begins_a_bucket_leaves",
    ),
    ("if start == found.bucket then found.present = held end", "", "what_a_charge_leaves_of_a_window_that_was_there"),
    (" and not window.is_known then", " then", "what_a_killed_worker_left_open_is_swept"),
    ("window.buckets + (present and 0 or 1)", "window.buckets", "what_a_charge_that_begins_a_bucket_leaves"),
    (
        "window.buckets + (present and 0 or 1)",
        "window.buckets + 1",
        "a_window_is_not_read_while_what_it_came_to_is_known",
    ),
    ("window.total - (present or 0)", "window.total", "what_a_charge_leaves_of_a_window_that_was_there"),
    ("window.total - (present or 0)", "window.total - cost", "what_a_charge_leaves_of_a_window_that_was_there"),
    (
        "window.oldest < window.bucket and window.oldest or window.bucket)",
        "window.bucket)",
        "the_oldest_that_it_says_is_told",
    ),
    (
        "window.oldest < window.bucket and window.oldest or window.bucket)",
        "window.oldest)",
        "the_first_charge_of_a_bucket_leaves_a_text_and_those_after_it_leave_it_alone",
    ),
    ("math.min(window.bucket_s, HINT_KEEP_S))", "window.bucket_s)", "of_many_windows_each_has_its_own"),
    ("math.min(window.bucket_s, HINT_KEEP_S))", "HINT_KEEP_S)", "what_is_kept_and_for_how_long"),
]
EXTEND = [
    (
        "(%x%x%x%x%x%x%x%x)%x*",
        "(%x+)",
        "a_record_of_a_version_before_is_said_again_extended_and_ended",
    ),
    ("if now_us > tonumber(ARGV[2]) then", "if false then", "past_the_deadline_nothing_is_extended"),
    (
        "if now_us > tonumber(ARGV[2]) then",
        "if now_us >= tonumber(ARGV[2]) then",
        "a_record_or_a_marker_that_was_written_by_hand_is_no_error",
    ),
    ("now_us = time[1] * SECOND + time[2]", "now_us = time[1] * SECOND", "by_the_servers_own_time"),
    (
        "if not record then return { 8, 0, now_us } end\n",
        "if not record then return { 9, 0, now_us } end\n",
        "no_extension_of_what_is_over_unknown_or_another_request",
    ),
    (
        "if request_digest ~= ARGV[3] then return { 9, 0, now_us } end",
        "",
        "an_end_or_extension_for_another_request_is_a_conflict",
    ),
    (
        "floor(made_at_us / SECOND), ceil",
        "floor(now_us / SECOND), ceil",
        "an_extension_is_booked_in_the_periods_of_its_reservation",
    ),
    ("ceil(pending_s / 12)", "floor(pending_s / 12)", "pending_money_has_buckets_of_a_twelfth_rounded_up"),
    (
        "ceil(window_s / 20) -- As",
        "floor(window_s / 20) -- As",
        "a_window_of_any_length_has_buckets_of_a_twentieth_rounded_up",
    ),
    (
        "place.ttl_s, place.hint = format('%.0f', made_s - made_s % bucket_s), window_s",
        "place.ttl_s, place.hint = format('%.0f', made_s), window_s",
        "between_two_buckets_the_one_that_has_begun_counts",
    ),
    (
        "ends_us = math.min(ends_us, (place",
        "ends_us = math.max(ends_us, (place",
        "what_has_ended_is_past_its_time_or_is_unknown_cannot_be_extended",
    ),
    (
        "ends_us = math.min(ends_us, (place",
        "ends_us = ((place",
        "no_extension_of_what_is_over_unknown_or_another_request",
    ),
    (
        "(place.bucket + place.ttl_s) * SECOND)",
        "(place.bucket + window_s) * SECOND)",
        "a_reservation_may_be_extended_until_its_bucket_leaves_the_window",
    ),
    (
        "if state ~= 'open' or ends_us <= now_us then",
        "if ends_us <= now_us then",
        "what_has_ended_is_past_its_time_or_is_unknown_cannot_be_extended",
    ),
    (
        "if state ~= 'open' or ends_us <= now_us then",
        "if state ~= 'open' then",
        "what_has_ended_is_past_its_time_or_is_unknown_cannot_be_extended",
    ),
    (
        "if state ~= 'open' or ends_us <= now_us then",
        "if state ~= 'open' or ends_us < now_us then",
        "what_has_ended_is_past_its_time_or_is_unknown_cannot_be_extended",
    ),
    (
        "then return { 8, held, now_us } end",
        "then return { 8, 0, now_us } end",
        "no_extension_of_what_has_left_the_shortest_window",
    ),
    ("local reset_us = MINE ~= '0' and", "local reset_us =", "an_extension_goes_by_the_buckets"),
    ("made_at_us <= reset_us", "made_at_us < reset_us", "what_was_cleared_may_be_extended_in_part_as_the_others_allow"),
    (
        "made_at_us <= reset_us",
        "made_at_us > reset_us",
        "a_reset_before_a_reservation_or_one_that_is_no_time_clears_nothing",
    ),
    (
        "is_cleared and owner == MINE",
        "is_cleared",
        "what_was_cleared_may_be_extended_in_part_as_the_others_allow",
    ),
    ("is_cleared and owner == MINE", "false", "what_was_cleared_may_be_extended_in_part_as_the_others_allow"),
    ("math.max(ARGV[4] - held, 0), nil", "ARGV[4] - held, nil", "an_extension_sent_again_charges_nothing_more"),
    (
        "math.max(ARGV[4] - held, 0), nil",
        "tonumber(ARGV[4]), nil",
        "more_than_was_reserved_is_booked_and_returned_as_overrun",
    ),
    (
        "if flat[i] >= since_text then total",
        "if true then total",
        "what_has_left_the_window_is_not_in_the_way_of_an_extension",
    ),
    (
        "floor(now_us / SECOND - ttl_s) + 1",
        "floor(now_us / SECOND - ttl_s)",
        "an_extension_goes_to_the_buckets_of_its_reservation_and_counts_what_counts_now",
    ),
    (
        "total = total + flat[i + 1]",
        "total = tonumber(flat[i + 1])",
        "an_extension_tells_what_each_budget_has_itself",
    ),
    ("not find(text, '^%d+$') or #text", "#text", "an_error_names_the_place_and_no_key"),
    (" or #text > 16) then error('KEYS", " or #text > 17) then error('KEYS", "an_error_names_the_place_and_no_key"),
    (
        "error('KEYS ' .. 1 + i .. ' holds no amount')",
        "error(KEYS[1 + i] .. ' holds no amount')",
        "an_error_names_the_place_and_no_key",
    ),
    (
        "hold_to(not place.is_cleared and",
        "hold_to(",
        "an_extension_of_what_was_cleared_is_charged_to_the_others_only",
    ),
    (
        "place.limit and place.limit - place.spent or math.huge",
        "place.limit or math.huge",
        "an_extension_that_is_refused_leaves_the_text_alone",
    ),
    (
        "place.limit and place.limit - place.spent or math.huge",
        "place.limit and place.limit - place.spent or 0",
        "without_a_limit_there_is_always_room",
    ),
    (
        "if room < at_least - held and",
        "if room <= at_least - held and",
        "an_extension_exactly_to_a_limit_is_granted_and_one_nano_dollar_more_is_not",
    ),
    (
        "if room < at_least - held and",
        "if room < at_least and",
        "an_extension_exactly_to_a_limit_is_granted_and_one_nano_dollar_more_is_not",
    ),
    (
        "and not refusing then refusing",
        "then refusing",
        "an_extension_is_held_to_the_limits_of_its_own_hour_and_day",
    ),
    ("more = math.min(more, math.max(room, 0))", "more = math.max(room, 0)", "an_extension_refused_or_granted_in_part"),
    (
        "  more = math.min(more, math.max(room, 0))\n",
        "",
        "of_several_limits_the_narrowest_says_how_much_there_is_room_for",
    ),
    ("math.max(room, 0)", "room", "a_limit_lowered_below_what_is_spent_extends_nothing_and_takes_nothing_back"),
    ("call('ZRANGE', key, 0, -1))", "{})", "an_extension_adds_to_what_it_was_charged_to"),
    (
        "if refusing and at_least > held then",
        "if refusing then",
        "a_limit_lowered_below_what_is_spent_extends_nothing_and_takes_nothing_back",
    ),
    (
        "if refusing and at_least > held then",
        "if false then",
        "an_extension_exactly_to_a_limit_is_granted_and_one_nano_dollar_more_is_not",
    ),
    (
        "{ tonumber(status), held, now_us, refusing }",
        "{ tonumber(status), held, now_us, status - 1 }",
        "one_budget_alone_without_an_identifier",
    ),
    (
        "if is_first and call('TTL', key) < ttl_s then",
        "if false then",
        "an_extension_makes_a_lost_total_again_with_its_ttl",
    ),
    (
        "if is_first and call('TTL', key) < ttl_s then",
        "if is_first then",
        "an_extension_makes_what_was_lost_again_with_its_ttl",
    ),
    (
        "if is_first and call('TTL', key) < ttl_s then",
        "if call('TTL', key) < ttl_s then",
        "an_extension_prolongs_no_ttl",
    ),
    (
        "held + more, made_at_us, request_digest",
        "tonumber(ARGV[4]), made_at_us, request_digest",
        "an_extension_takes_what_there_is_room_for_if_that_is_enough",
    ),
    ("format('open %.0f %.0f %s %s', held", "format('open %.14g %.0f %s %s', held", "a_record_fits_in_200_bytes"),
    ("request_digest, charged_to), 'KEEPTTL')", "request_digest, charged_to))", "an_extension_prolongs_no_ttl"),
    (
        "'^open (%x+) (%S+) %d+ (%d+)$'",
        "'^%a+ (%x+) (%S+) %d+ (%d+)$'",
        "a_key_that_has_ended_is_not_opened_by_an_extension",
    ),
    ("if body and its_rid == rid then", "if body then", "an_extension_leaves_the_key_of_another_request_alone"),
    ("if body and its_rid == rid then", "if false then", "the_key_of_an_extended_request_shows_what_it_holds"),
    (
        "held + more, until_us), 'KEEPTTL')",
        "held + more, until_us), 'EX', 86400)",
        "the_ttl_of_an_idempotency_key_is_a_day_from_its_last_change",
    ),
    (
        "if more > 0 and not place.is_cleared then",
        "if not place.is_cleared then",
        "an_extension_that_adds_nothing_makes_nothing",
    ),
    (
        "if more > 0 and not place.is_cleared then",
        "if more > 0 then",
        "an_extension_of_what_was_cleared_is_charged_to_the_others_only",
    ),
    ("charge_bucket(key, place.bucket, place.ttl_s), texts", "nil, texts", "an_extension_holds_more_in_every_scope"),
    ("      call('INCRBY', key, more_text)\n", "", "an_extension_holds_more_in_every_scope"),
    (
        "if place.spent == 0 and place.keep_until_s ~= '0' then",
        "if place.spent == 0 then",
        "a_total_that_lasts_for_ever_has_no_ttl_whoever_makes_it",
    ),
    (
        "if place.spent == 0 and place.keep_until_s ~= '0' then",
        "if place.keep_until_s ~= '0' then",
        "no_extension_prolongs_a_ttl",
    ),
    (
        "if place.spent == 0 and place.keep_until_s ~= '0' then",
        "if false then",
        "an_extension_makes_a_lost_total_again_with_its_ttl",
    ),
    ("(place.is_cleared and 0 or more)\n", "more\n", "an_extension_of_what_was_cleared_is_charged_to_the_others_only"),
    ("for i = 1, more > 0 and OWNERS or 0 do", "for i = 1, OWNERS do", "an_extension_that_adds_nothing_makes_nothing"),
    (
        "for i = 1, more > 0 and OWNERS or 0 do",
        "for i = 1, more > 0 and OWNERS - 1 or 0 do",
        "expired_amounts_are_reported_once",
    ),
    ("(i == EVERYBODY and RECORD_KEEP_S or 0)", "0", "an_extension_makes_a_lost_total_again_with_its_ttl"),
    (
        "if not (is_cleared and i == tonumber(MINE)) then charge",
        "do charge",
        "an_extension_of_what_was_cleared_is_charged_to_the_others_only",
    ),
    (
        "format('%.0f', made_s - made_s % pending_bucket_s)",
        "format('%.0f', floor(now_us / SECOND) - floor(now_us / SECOND) % pending_bucket_s)",
        "an_extension_prolongs_no_ttl",
    ),
    ("(is_first or match(hint,", "(match(hint,", "a_change_that_makes_its_bucket_anew_takes_it_away"),
    (
        "(is_first or match(hint, '^%d+ (%d+) ') ~= place.bucket) then",
        "is_first then",
        "a_change_of_an_earlier_bucket_takes_it_away",
    ),
    (
        "hint and (is_first or match(hint, '^%d+ (%d+) ') ~= place.bucket) then",
        "hint then",
        "a_change_of_the_present_bucket_leaves_the_text",
    ),
    ("'^%d+ (%d+) ') ~= place.bucket", "'^(%d+)') ~= place.bucket", "a_change_of_the_present_bucket_leaves_the_text"),
    (
        "call('DEL', KEYS[1 + place.hint])",
        "call('DEL', KEYS[2 + BUDGETS])",
        "of_two_windows_each_has_its_own_text_taken_away",
    ),
    (
        "place.ttl_s), texts[place.hint]",
        "place.ttl_s), texts[BUDGETS + 1]",
        "of_two_windows_each_has_its_own_text_taken_away",
    ),
    ("call('ZCARD', key) and pending_bucket", "pending_bucket", "extend_with_a_key_of_another_kind"),
    ("is_plain and call", "call", "an_extension_adds_to_what_it_was_charged_to"),
]
EXTEND_BY_HINTS = [
    (
        "window_s + ceil(window_s / 20) == place.ttl_s",
        "true",
        "an_extension_does_not_believe_a_text_of_something_else",
    ),
    (
        "and oldest + place.ttl_s > now_us / SECOND",
        "",
        "an_extension_does_not_believe_a_text_of_something_else",
    ),
    (
        "oldest + place.ttl_s > now_us / SECOND",
        "oldest + place.ttl_s >= now_us / SECOND",
        "an_extension_does_not_believe_a_text_of_something_else",
    ),
    (
        "call('ZCARD', key) == tonumber(buckets) and",
        "",
        "an_extension_does_not_believe_a_text_of_something_else",
    ),
    (
        "is_of_it and call('ZCARD'",
        "window_s and call('ZCARD'",
        "an_extension_does_not_believe_a_text_of_something_else",
    ),
    (
        "and call('ZSCORE', key, bucket)",
        "and (call('ZSCORE', key, bucket) or 0)",
        "an_extension_does_not_believe_a_text_of_something_else",
    ),
    ("one and others + one", "one and tonumber(others)", "an_extension_believes_what_may_be_believed"),
    ("one and others + one", "one and tonumber(one)", "an_extension_believes_what_may_be_believed"),
    ("one and others + one or", "", "an_extension_believes_what_may_be_believed"),
    (
        "match(texts[place.hint] or ''",
        "match(texts[BUDGETS + 1] or ''",
        "an_extension_of_two_windows_goes_by_the_text_of_each",
    ),
    ("'^([1-9]%d*) (%d+)", "'^(%d+) (%d+)", "an_extension_does_not_believe_a_text_by_hand"),
    ("'^([1-9]%d*) (%d+)", "'([1-9]%d*) (%d+)", "an_extension_does_not_believe_a_text_by_hand"),
    ("(%d+)$')\n  local is_of_it", "(%d+)')\n  local is_of_it", "an_extension_does_not_believe_a_text_by_hand"),
    ("if more < wanted then", "if false then", "an_extension_goes_by_the_buckets"),
    ("if more < wanted then", "if true then", "an_extension_believes_what_may_be_believed"),
    ("  check_all()\nend", "end", "an_extension_goes_by_the_buckets"),
    ("more, refusing = wanted, nil", "more = wanted", "an_extension_goes_by_the_buckets"),
    ("more, refusing = wanted, nil", "more, refusing = more or wanted, nil", "an_extension_goes_by_the_buckets"),
]
SETTLE = [
    (
        "(%x%x%x%x%x%x%x%x)%x*",
        "(%x+)",
        "a_record_of_a_version_before_is_said_again_extended_and_ended",
    ),
    ("now_us = time[1] * SECOND + time[2]", "now_us = time[1] * SECOND", "by_the_servers_own_time"),
    (
        "  if known_digest ~= ARGV[2] then return { 9, 0, now_us, 0 } end\n",
        "",
        "an_end_or_extension_for_another_request_is_a_conflict",
    ),
    (
        "  if state ~= 'open' then return { 1, tonumber(nanousd), now_us, 0 } end\n",
        "",
        "a_second_settlement_gets_the_first_answer_and_changes_nothing",
    ),
    (
        "return { 1, tonumber(nanousd), now_us, 0 }",
        "return { 1, delta, now_us, 0 }",
        "a_second_settlement_gets_the_first_answer_and_changes_nothing",
    ),
    ("delta = delta - held", "delta = 0 - held", "a_settlement_books_what_was_used"),
    ("held, charged_to = tonumber(nanousd), its", "held, charged_to = delta, its", "a_total_of_nothing_is_an_amount"),
    (
        "elseif now_us >= made_at_us",
        "elseif false and now_us >= made_at_us",
        "past_its_time_an_unended_reservation_stays_booked_in_full",
    ),
    (
        "elseif now_us >= made_at_us",
        "elseif now_us > made_at_us",
        "a_lost_record_is_late_until_the_record_of_an_end_may_be_over",
    ),
    (
        "made_at_us + RECORD_KEEP_S * SECOND then",
        "made_at_us + pending_s * SECOND then",
        "settled_repeated_late_expired_conflict",
    ),
    (
        "local status, delta, held, charged_to = 0, tonumber(ARGV[4]), 0",
        "local status, delta, held, charged_to = 0, 0, 0",
        "a_lost_record_and_booking_is_booked_late_and_once",
    ),
    ("  status = 2\n", "", "a_lost_record_and_booking_is_booked_late_and_once"),
    ("local reset_us = MINE > 0 and", "local reset_us =", "what_changes_nothing_leaves_the_text_alone"),
    (
        "made_at_us <= reset_us",
        "made_at_us < reset_us",
        "what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them",
    ),
    (
        "made_at_us <= reset_us",
        "made_at_us >= reset_us",
        "a_reset_before_a_reservation_or_one_that_is_no_time_clears_nothing",
    ),
    ("is_cleared and tonumber(owner) == MINE", "is_cleared", "the_identifier_and_everybody_are_told_by_their_numbers"),
    (
        "is_cleared and tonumber(owner) == MINE",
        "false",
        "what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them",
    ),
    (
        "floor(made_at_us / SECOND), ceil",
        "floor(now_us / SECOND), ceil",
        "a_settlement_lands_in_the_periods_of_its_reservation",
    ),
    ("ceil(pending_s / 12)", "floor(pending_s / 12)", "pending_money_has_buckets_of_a_twelfth_rounded_up"),
    ("ceil(window_s / 20)", "floor(window_s / 20)", "a_window_of_any_length_has_buckets_of_a_twentieth_rounded_up"),
    (
        "format('%.0f', made_s - made_s % bucket_s), bucket_s + window_s",
        "format('%.0f', made_s), bucket_s + window_s",
        "between_two_buckets_the_one_that_has_begun_counts",
    ),
    (
        "bucket + ttl_s, call",
        "bucket + tonumber(window_s), call",
        "what_has_aged_out_is_not_made_again",
    ),
    (
        "text = texts[i] or call('GET', KEYS[1 + i])",
        "text = texts[i]",
        "a_late_settlement_with_a_key_of_another_kind",
    ),
    ("call('ZSCORE', KEYS[1 + i], bucket)", "nil", "what_there_is_keeps_its_ttl"),
    ("not find(text, '^%d+$') or #text", "#text", "an_error_names_the_place_and_no_key"),
    (" or #text > 16) then error('KEYS", " or #text > 17) then error('KEYS", "an_error_names_the_place_and_no_key"),
    (
        "error('KEYS ' .. 1 + i .. ' holds no amount')",
        "error(KEYS[1 + i] .. ' holds no amount')",
        "an_error_names_the_place_and_no_key",
    ),
    (
        "ends_s > 0 and ends_s * SECOND <= now_us",
        "ends_s * SECOND <= now_us",
        "amounts_below_2_to_the_53_are_exact_in_every_kind_of_budget",
    ),
    (
        "ends_s > 0 and ends_s * SECOND <= now_us",
        "false",
        "what_has_left_the_window_is_not_extended_and_its_settlement_makes_nothing_anew",
    ),
    (
        "ends_s * SECOND <= now_us",
        "ends_s * SECOND < now_us",
        "what_has_aged_out_is_not_made_again",
    ),
    (
        "is_over or is_cleared and tonumber(owner) == MINE) and",
        "is_over) and",
        "what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them",
    ),
    ("max(delta, -(there or 0))", "delta", "no_total_goes_below_nothing"),
    (
        "(member > next_text and not find(member, '^%d%d%d%d%d%d%d%d%d%d'))",
        "false",
        "pending_money_of_no_time_is_swept_by_an_end",
    ),
    (
        "now_s + 1 - pending_bucket_s - pending_s",
        "now_s - pending_bucket_s - pending_s",
        "expired_amounts_are_reported_once",
    ),
    (
        "now_s + 1 - pending_bucket_s - pending_s",
        "now_s + 1 - pending_s",
        "pending_money_is_over_to_the_microsecond",
    ),
    (
        "(member == own and held or 0)",
        "held",
        "all_that_has_expired_is_told_together",
    ),
    (
        "not (is_cleared and i == MINE) and own",
        "own",
        "what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them",
    ),
    (
        "not (is_cleared and i == MINE) and own",
        "not is_cleared and own",
        "the_identifier_and_everybody_are_told_by_their_numbers",
    ),
    (
        "      if is_over then expired = expired + max(others, 0) end\n",
        "",
        "expired_amounts_are_reported_once",
    ),
    (
        "if is_over then expired",
        "if true then expired",
        "a_settlement_books_what_was_used_in_place_of_what_was_reserved",
    ),
    ("expired + max(others, 0)", "max(others, 0)", "all_that_has_expired_is_told_together"),
    ("max(others, 0) end", "others end", "what_has_expired_is_never_less_than_nothing"),
    (
        "if is_over or others <= 0 then",
        "if others <= 0 then",
        "expired_amounts_are_reported_once",
    ),
    (
        "if is_over or others <= 0 then",
        "if is_over or others < 0 then",
        "a_bucket_of_nothing_is_removed_and_a_total_of_nothing_is_not",
    ),
    (
        "if is_over or others <= 0 then",
        "if is_over then",
        "a_bucket_of_nothing_is_removed_and_a_total_of_nothing_is_not",
    ),
    ("else rest = own end", "end", "an_end_takes_no_more_than_its_own_pending_amount"),
    (
        "format('%.0f', made_s - made_s % pending_bucket_s)",
        "format('%.0f', made_s)",
        "between_two_buckets_the_one_that_has_begun_counts",
    ),
    (
        "format('%s %s %.0f %s %s', ARGV[3], ARGV[4],",
        "format('%s %s %.0f %s %s', ARGV[3], held,",
        "a_second_settlement_gets_the_first_answer_and_changes_nothing",
    ),
    (
        "format('%s %s %.0f %s %s', ARGV[3], ARGV[4],",
        "format('%s %s %.0f %s %s', 'paid', ARGV[4],",
        "a_release_leaves_its_record_for_an_hour",
    ),
    ("ARGV[2], ARGV[6]), 'EX', RECORD_KEEP_S)", "ARGV[2], ARGV[6]))", "the_known_layout_of_keys"),
    ("ARGV[2], ARGV[6]), 'EX', RECORD_KEEP_S)", "ARGV[2], ARGV[6]), 'KEEPTTL')", "what_is_kept_and_for_how_long"),
    (
        "if ARGV[3] == 'paid' and",
        "if",
        "without_its_record_a_reservation_is_not_extended_and_a_release_books_nothing",
    ),
    ("(not known or rid == ARGV[10])", "true", "an_end_leaves_the_key_of_another_request_alone"),
    ("(not known or rid == ARGV[10])", "rid == ARGV[10]", "a_lost_record_and_booking_is_booked_late_and_once"),
    ("(not known or rid == ARGV[10])", "not known", "a_callers_key_fits_in_200_bytes"),
    ("elseif rid == ARGV[10] then", "elseif known then", "an_end_leaves_the_key_of_another_request_alone"),
    (
        "elseif rid == ARGV[10] then",
        "elseif false then",
        "without_its_record_a_reservation_is_not_extended_and_a_release_books_nothing",
    ),
    (
        "format('settled %s %s %s %.0f', body",
        "format('open %s %s %s %.0f', body",
        "a_key_in_flight_settled_and_on_another_body",
    ),
    (
        "now_us), 'EX', IDEMPOTENCY_KEEP_S)",
        "now_us), 'EX', RECORD_KEEP_S)",
        "a_key_is_kept_for_a_day_from_its_last_change",
    ),
    (
        "  if place.change == 0 then\n",
        "  if false then\n",
        "nothing_goes_below_nothing_and_nothing_that_is_lost_is_made_by_taking_from_it",
    ),
    ("    call('INCRBY', key, change)\n", "", "a_settlement_books_what_was_used"),
    (
        "if not place.held and place.ends_s > 0 then call",
        "if place.ends_s > 0 then call",
        "no_total_goes_below_nothing",
    ),
    (
        "if not place.held and place.ends_s > 0 then call",
        "if not place.held then call",
        "a_total_that_lasts_for_ever_has_no_ttl_whoever_makes_it",
    ),
    (
        "if not place.held and place.ends_s > 0 then call",
        "if false then call",
        "a_lost_record_and_booking_is_booked_late_and_once",
    ),
    (
        "call('ZINCRBY', key, change, place.bucket)) <= 0 then",
        "call('ZINCRBY', key, change, place.bucket)) < 0 then",
        "nothing_goes_below_nothing_and_nothing_that_is_lost_is_made_by_taking_from_it",
    ),
    (
        "call('ZINCRBY', key, change, place.bucket)) <= 0 then",
        "call('ZINCRBY', key, change, place.bucket)) <= 1 then",
        "a_nano_dollar_is_an_amount",
    ),
    (
        "    call('ZREM', key, place.bucket)\n",
        "",
        "books_and_reservations_say_when_the_oldest_amount_leaves_the_window",
    ),
    (
        "elseif not place.held and call('TTL', key) < place.ttl_s then",
        "elseif not place.held and call('TTL', key) < 0 then",
        "a_late_booking_outlives_an_older_bucket_beside_it",
    ),
    (
        "elseif not place.held and call('TTL', key) < place.ttl_s then",
        "elseif not place.held then",
        "what_a_settlement_makes_anew_has_its_ttl",
    ),
    (
        "elseif not place.held and call('TTL', key) < place.ttl_s then",
        "elseif call('TTL', key) < place.ttl_s then",
        "a_settlement_prolongs_no_ttl",
    ),
    (
        "if hint and not (place.held and",
        "if hint and not (",
        "a_change_that_makes_its_bucket_anew_takes_it_away",
    ),
    (
        "'^%d+ (%d+) ') == place.bucket) then call",
        "'^(%d+)') == place.bucket) then call",
        "a_change_of_the_present_bucket_leaves_the_text",
    ),
    (
        "'^%d+ (%d+) ') == place.bucket) then call",
        "'^%d+ (%d+) ')) then call",
        "a_change_of_an_earlier_bucket_takes_it_away",
    ),
    ("hints = hints + 1\n", "\n", "of_two_windows_each_has_its_own_text_taken_away"),
    ("if is_over or member == own then", "if is_over then", "an_end_takes_no_more_than_its_own_pending_amount"),
    ("else rest = own end", "else rest = pending_bucket end", "an_end_takes_back_no_more_than_its_own"),
    (
        "KEYS[1 + place.hint]",
        "KEYS[2 + BUDGETS]",
        "of_two_windows_each_has_its_own_text_taken_away",
    ),
    (
        "texts[place.hint]",
        "texts[BUDGETS + 1]",
        "of_two_windows_each_has_its_own_text_taken_away",
    ),
    (
        "if its.rest then call('ZINCRBY'",
        "if false then call('ZINCRBY'",
        "an_end_takes_no_more_than_its_own_pending_amount",
    ),
    (
        "  if #its.over > 0 then call('ZREM', its.key, unpack(its.over)) end\n",
        "",
        "expired_amounts_leave_the_pending_set_when_they_are_reported",
    ),
    (
        "pendings[EVERYBODY] and pendings[EVERYBODY].expired or 0 }",
        "pendings[OWNERS].expired }",
        "only_everybodys_pending_money_is_kept_longer_and_reported",
    ),
    ("return { status, tonumber(ARGV[4]), now_us", "return { status, held, now_us", "released"),
]
PENDING = [
    ("match(ARGV[6], '%S*$'), 1", "match(ARGV[6], '%S*$'), 7", "a_budget_is_busy_by_what_it_is_charged_with_alone"),
    ("next_digest = next_digest + 6", "next_digest = next_digest + 5", "of_many_each_is_counted_by_its_own_digest"),
    ("if is_further then next_digest", "if true then next_digest", "of_many_each_is_counted_by_its_own_digest"),
    (
        "local is_further = status == '13'",
        "local is_further = true",
        "the_six_are_busy_by_what_they_are_charged_with_alone",
    ),
    (
        "or (digest == THE_SIX and #member == 10)",
        "or #member == 10",
        "what_a_version_before_wrote_makes_no_further_budget_busy",
    ),
    ("or (digest == THE_SIX and #member == 10)", "", "busy_and_spent_differ"),
    ("if is_charged and is_in", "if is_in", "a_budget_is_busy_by_what_it_is_charged_with_alone"),
    ("pending_bucket .. (suffix() or '')", "pending_bucket", "what_is_charged_to_others_too_says_so_for_each_owner"),
    (
        "call('ZREM', key, members[j])",
        "call('ZREM', key, pending_bucket)",
        "where_one_owner_takes_no_more_the_others_get_back_what_they_had",
    ),
    ("-cost, members[j])", "-cost, pending_bucket)", "where_one_owner_takes_no_more_the_others_get_back_what_they_had"),
    (
        "floor(now_us / SECOND - lasts_s) + 1",
        "floor(now_us / SECOND - lasts_s)",
        "what_is_over_does_not_count_and_what_is_not_does",
    ),
    (
        "floor(now_us / SECOND - lasts_s) + 1",
        "floor(now_us / SECOND - lasts_s)",
        "a_new_member_sweeps_what_is_over_and_nothing_that_counts",
    ),
]
OWN_MEMBER = [
    ("local is_more = #member > #own and sub", "local is_more = sub", "whatever_is_pending_beside_it_is_left_alone"),
    (
        "#member > #own and sub(member, 1, 10) == pending_bucket",
        "#member > #own",
        "whatever_is_pending_beside_it_is_left_alone",
    ),
    ("if is_more and gsub(", "if is_more or gsub(", "whatever_is_pending_beside_it_is_left_alone"),
    (
        "'......', named) == '' then",
        "'......', named) ~= sub(member, 12) then",
        "whatever_is_pending_beside_it_is_left_alone",
    ),
    ("not find(charged_to, ' - -', 1, true) and '' or nil", "''", "whatever_is_pending_beside_it_is_left_alone"),
    ("not find(charged_to, ' - -', 1, true) and '' or nil", "nil", "whatever_is_pending_beside_it_is_left_alone"),
    ("do named[digest] = '' end", "do named[digest] = nil end", "whatever_is_pending_beside_it_is_left_alone"),
]
OWN_MEMBER_AT_AN_END = [
    (
        "not (is_cleared and i == MINE) and own_member",
        "own_member",
        "what_was_cleared_is_in_nobodys_pending_money_again",
    ),
    (
        "member < since_text or",
        "(#member == 10 and member < since_text) or",
        "an_end_sweeps_what_is_over_whatever_it_is_charged_to",
    ),
    (
        "format('%.0f', -held), its.rest)",
        "format('%.0f', -held), pending_bucket)",
        "an_end_takes_back_no_more_than_its_own",
    ),
]
TO_THE_NANO_DOLLAR = [
    ("math.max(0, whole - own)", "(whole - own)"),
    ("math.max(0, whole - own)", "whole"),
    ("millionths * floor(rest / 1e6)", "floor(millionths * (rest / 1e6))"),
    ("floor(millionths * (rest % 1e6) / 1e6)", "millionths * (rest % 1e6) / 1e6"),
    ("floor(millionths * (rest % 1e6) / 1e6)", "ceil(millionths * (rest % 1e6) / 1e6)"),
    (" + floor(millionths * (rest % 1e6) / 1e6)", ""),
    ("(rest % 1e6) / 1e6) - own\n", "(rest % 1e6) / 1e6)\n"),
]
SHARES = [
    *(
        (right.replace("math.max", "max"), wrong.replace("math.max", "max"), "a_share_to_the_nano_dollar")
        for right, wrong in TO_THE_NANO_DOLLAR
    ),
    ("fits = fits and cost <= left_of", "fits = fits and cost - 1 <= left_of", "a_share_to_the_nano_dollar"),
    (
        "fits = fits and cost <= left_of",
        "fits = cost <= left_of",
        "a_limit_that_fails_is_not_mended_by_a_share_that_fits",
    ),
    (
        "fits = fits and cost <= left_of",
        "fits = true or left_of",
        "a_refusal_by_a_share_lasts_until_its_period_ends_and_sets_no_marker",
    ),
    ("left_of_share(spent[number], spent[of],", "left_of_share(spent[number], 0,", "a_share_to_the_nano_dollar"),
    ("left_of_share(spent[number], spent[of],", "left_of_share(0, spent[of],", "a_share_to_the_nano_dollar"),
    (
        "status = 14, marker_s = 0",
        "status = 13, marker_s = 0",
        "a_refusal_by_a_share_lasts_until_its_period_ends_and_sets_no_marker",
    ),
    (
        "status = 14, marker_s = 0",
        "status = 14, marker_s = 9",
        "a_refusal_by_a_share_lasts_until_its_period_ends_and_sets_no_marker",
    ),
    (
        "math.min(first_shared, of)",
        "tonumber(of)",
        "shares_are_told_before_all_that_is_shared_and_after_what_comes_before_that",
    ),
    ("math.min(first_shared, of)", "1", "shares_are_told_before_all_that_is_shared_and_after_what_comes_before_that"),
    (
        "i == first_shared and shares",
        "i == BUDGETS and shares",
        "shares_are_told_before_all_that_is_shared_and_after_what_comes_before_that",
    ),
    (
        "held_in(number), held_in(of), limits[of]",
        "held_in(number), spent[of], limits[of]",
        "what_others_hold_makes_a_share_busy_as_far_as_it_would_do",
    ),
    (
        "held_in(number), held_in(of), limits[of]",
        "spent[number], held_in(of), limits[of]",
        "what_its_owner_holds_makes_a_share_busy",
    ),
    (
        "cost > left_of(bound, nothing)",
        "cost > limits[bound.number]",
        "what_is_more_than_a_whole_share_waits_for_nothing_that_was_spent",
    ),
    (
        "cost > left_of(bound, nothing)",
        "cost > left_of(bound, now)",
        "what_is_more_than_a_whole_share_waits_for_nothing_that_was_spent",
    ),
    (
        "math.min(room, left)",
        "math.min(room, limits[bound.number] - spent[bound.number])",
        "of_what_is_left_of_a_share_less_will_do",
    ),
]
SHARES_OF_AN_EXTENSION = [
    ("math.max(0, whole - own)", "(whole - own)", "what_an_extension_counts_of_others_is_never_below_nothing"),
    *((right, wrong, "an_extension_knows_a_share_to_the_nano_dollar") for right, wrong in TO_THE_NANO_DOLLAR[1:]),
    ("math.min(first_shared or of, of)", "tonumber(of)", "an_extension_is_refused_in_the_same_order"),
    ("i == first_shared and shares", "i == 1 and shares", "an_extension_is_refused_in_the_same_order"),
    ("i == first_shared and shares", "i == OWNERS + 4 and shares", "an_extension_is_refused_in_the_same_order"),
    (
        "hold_to(share.left, share.number, 14)",
        "hold_to(share.left, share.number, 13)",
        "an_extension_to_the_last_nano_dollar_of_a_share",
    ),
    (
        "hold_to(share.left, share.number, 14)",
        "hold_to(share.left, i, 14)",
        "an_extension_to_the_last_nano_dollar_of_a_share",
    ),
    ("whole.spent, whole.limit", "0, whole.limit", "an_extension_to_the_last_nano_dollar_of_a_share"),
    ("left_of_share(part.spent, whole", "left_of_share(0, whole", "an_extension_to_the_last_nano_dollar_of_a_share"),
    (
        "not (part.is_cleared or whole.is_cleared)",
        "not part.is_cleared",
        "an_extension_is_held_to_no_share_of_what_was_cleared",
    ),
    (
        "not (part.is_cleared or whole.is_cleared)",
        "not whole.is_cleared",
        "an_extension_is_held_to_no_share_of_what_was_cleared",
    ),
    ("math.max(room, 0)", "room", "an_extension_of_what_is_over_its_share_keeps_what_it_holds"),
]
MUTANTS = [
    *(("reserve.lua", *mutant) for mutant in (*RESERVE, *RUNNING_TEXTS, *PENDING, *SHARES)),
    *(("extend.lua", *mutant) for mutant in (*EXTEND, *EXTEND_BY_HINTS, *OWN_MEMBER, *SHARES_OF_AN_EXTENSION)),
    *(("settle.lua", *mutant) for mutant in (*SETTLE, *OWN_MEMBER, *OWN_MEMBER_AT_AN_END)),
]
BY_HAND = {
    name.removeprefix("test_"): test
    for module in (test_bounds, test_budgets, test_pending, test_replies, test_running, test_shares, test_wrong_kinds)
    for name, test in vars(module).items()
    if name.startswith("test_")
}


@pytest.fixture
def suite(redis_url):
    suite = RedisLayout()
    suite.harness = RedisHarness("atomic", redis_url)
    yield suite
    suite.harness.close()


def arguments_of(test):
    """What pytest calls it with, besides the client."""
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    ways = [
        [dict(zip(names, values, strict=True)) if isinstance(names, tuple) else {names: values} for values in each]
        for names, each in marks
    ]
    return [{name: value for part in parts for name, value in part.items()} for parts in product(*ways)]


def run(case, suite, client):
    if case not in BY_HAND:
        getattr(suite, f"test_{case}")()
        return
    for arguments in arguments_of(BY_HAND[case]):
        client.flushdb()
        BY_HAND[case](client, **arguments)


def mutant_of(script, right, wrong):
    mutant = Script(script)
    assert mutant.text.count(right) == 1, "the script has changed: so must this mutant"
    mutant.text = mutant.text.replace(right, wrong)
    mutant.digest = hashlib.sha1(mutant.text.encode(), usedforsecurity=False).hexdigest()
    return mutant


def test_no_case_is_of_both_kinds():
    assert not [case for case in BY_HAND if hasattr(RedisLayout, f"test_{case}")]


@pytest.mark.parametrize("case", sorted({case for *_, case in MUTANTS}))
def test_the_scripts_as_they_are_pass(suite, client, case):
    run(case, suite, client)


@pytest.mark.parametrize(("script", "right", "wrong", "case"), MUTANTS, ids=lambda text: text.strip()[:40])
def test_a_wrong_in_a_script_is_noticed(monkeypatch, suite, client, script, right, wrong, case):
    mutant, name = mutant_of(script, right, wrong), script.split(".", maxsplit=1)[0].upper()
    assert mutant.compile_error(client) is None
    monkeypatch.setattr(atomic, f"_{name}", mutant)
    monkeypatch.setattr(by_hand, name, mutant)
    try:
        run(case, suite, client)
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 (whatever it is, the mutant is noticed)
        return
    pytest.fail(f"{case} does not notice it")
