"""The suite can fail: each of these small wrongs in a script is noticed by the case of it that is named beside it."""

import hashlib
from itertools import product

import pytest
import redis

from backends.conformance.harness import RedisHarness
from backends.conformance.redis_layout import RedisLayout
from backends.store.scripts import Script
from backends.strategies import atomic
from tests.lua import by_hand, test_wrong_kinds

# What stands in the script, what is put in its place, and the case that notices.
RESERVE = [
    ("(i == 11 and RECORD_KEEP_S or 0)", "0", "expired_amounts_are_reported_after_an_hour_without_requests"),
    (
        "if oldest > over_text then",
        "if oldest >= over_text then",
        "a_window_has_never_more_members_than_buckets_and_one",
    ),
    (
        "if oldest > over_text then",
        "if true then",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "    if flat[i] > over_text then",
        "    if flat[i] >= over_text then",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "total = total - over_total",
        "total = total",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "if flat[i] < oldest then oldest = flat[i] end\n  end\n  if",
        "oldest = flat[i]\n  end\n  if",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "if flat[i] < oldest then oldest = flat[i] end\n    else",
        "oldest = flat[i]\n    else",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    (
        "local fits = daily + cost <= day_limit",
        "local fits = daily + cost < day_limit",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    ("local fits = daily + cost", "local fits = daily", "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not"),
    ("and recent.total + cost <= window_limit", "", "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not"),
    (
        "and recent.total + cost <= window_limit",
        "and recent.total + cost < window_limit",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    (
        "and network_recent.total + cost <= network_limit",
        "and network_recent.total + cost < network_limit",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    ("and network_daily + cost <= network_day_limit", "", "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not"),
    ("and global_hourly + cost <= global_hour_limit", "", "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not"),
    (
        "and global_daily + cost <= global_day_limit",
        "and global_daily + cost <= global_day_limit + 1",
        "exactly_equal_is_admitted_and_one_nano_dollar_more_is_not",
    ),
    (
        "if known_digest ~= request_digest then return { 9, 0, now_us } end",
        "",
        "an_id_of_another_request_or_one_that_has_ended_is_a_conflict",
    ),
    ("if state ~= 'open' then", "if false then", "an_id_of_another_request_or_one_that_has_ended_is_a_conflict"),
    ("if record then", "if false then", "the_same_id_sent_again_charges_once_and_gets_the_first_answer"),
    (
        "return { 0, tonumber(its_open_s), now_us",
        "return { 0, pending_s, now_us",
        "an_id_sent_again_keeps_the_lengths_that_it_was_admitted_with",
    ),
    (
        "tonumber(nanousd), 0, tonumber(its_window_s) }",
        "tonumber(nanousd), 0, window_s }",
        "an_id_sent_again_keeps_the_lengths_that_it_was_admitted_with",
    ),
    (
        "tonumber(nanousd), 0, tonumber(its_window_s) }",
        "cost, 0, tonumber(its_window_s) }",
        "what_was_extended_is_found_with_what_it_holds",
    ),
    ("if known then", "if false then", "a_key_in_flight_settled_and_on_another_body"),
    ("state == 'settled' and 2", "state == 'settled' and 1", "a_lost_record_and_booking_is_booked_late_and_once"),
    (
        "tonumber(until_us) <= now_us) and 3",
        "tonumber(until_us) < now_us) and 3",
        "the_key_of_a_request_that_did_not_end_in_time_is_expired",
    ),
    ("body == ARGV[18] and 1 or 0", "1", "a_key_set_by_hand_stands_for_an_unknown_request"),
    ("tonumber(nanousd or 0), body", "0, body", "the_same_id_sent_again_charges_once_and_gets_the_first_answer"),
    ("if marker then", "if false then", "under_a_marker_everything_is_refused_with_what_set_it"),
    (
        "or now_s - now_s % bucket_s) + bucket_s + window_s",
        "or now_s) + bucket_s + window_s",
        "the_oldest_amount_is_the_oldest_that_counts_not_the_smallest_nor_the_last",
    ),
    ("* (status == 2 and 2 or 1)", "", "a_refused_request_changes_nothing_but_the_marker"),
    (
        "if at_least and not busy then",
        "if at_least then",
        "while_what_is_under_way_may_make_room_for_all_of_it_no_less_is_set_aside",
    ),
    ("if at_least and not busy then", "if false then", "the_last_of_a_budget_is_set_aside_where_that_will_do"),
    ("    cost = at_least\n", "", "the_last_of_a_budget_is_set_aside_where_that_will_do"),
    (
        "    cost = at_least\n    check_all()",
        "    status = 0",
        "less_than_will_do_is_refused_and_nothing_is_set_aside",
    ),
    ("cost, cost_text = room, format", "cost_text = format", "the_last_of_the_fullest_budget_is_what_is_left"),
    (
        "cost, cost_text = room, format('%.0f', room)",
        "cost = room",
        "the_last_of_a_budget_is_set_aside_where_that_will_do",
    ),
    *[
        (term, "", "the_last_of_the_fullest_budget_is_what_is_left")
        for term in (
            "day_limit - daily, ",
            "window_limit - recent.total, ",
            "network_limit - network_recent.total,\n",
            "network_day_limit - network_daily, ",
            "global_hour_limit - global_hourly, ",
            ", global_day_limit - global_daily",
        )
    ],
    *[
        (
            f"KEYS[{key}], in_window_s,",
            f"KEYS[{key}], 0,",
            "a_pending_reservation_that_has_left_a_short_window_makes_nothing_busy",
        )
        for key in (9, 10)
    ],
    ("if busy and ARGV[14] ~= '1' then", "if false then", "a_pending_reservation_past_its_time_is_spent"),
    (
        "if status > 3 then",
        "if status > 4 then",
        "a_refused_request_changes_nothing_but_the_marker",
    ),
    ("busy = busy and spent", "busy = spent", "where_one_limit_is_busy_and_another_spent_it_is_not_called_busy"),
    ("wait_s = math.max(wait_s, marker_s)", "", "busy_sets_the_marker_where_mark_when_busy_is_set"),
    ("if held_before == 0 then call('EXPIRE', key, ends_at_s - now_s) end", "", "the_known_layout_of_keys"),
    (
        "if held_before == 0 then call('EXPIRE'",
        "if true then call('EXPIRE'",
        "a_reservation_prolongs_a_ttl_with_a_new_bucket_only",
    ),
    (
        "tonumber(call('ZINCRBY', key, cost_text, start)) == cost",
        "call('ZINCRBY', key, cost_text, start) == ''",
        "a_window_is_kept_as_long_as_its_youngest_bucket_whatever_its_length_was",
    ),
    ("if is_new then", "if true then", "a_reservation_prolongs_a_ttl_with_a_new_bucket_only"),
    (
        "elseif call('PTTL', key) < left_ms then",
        "elseif false then",
        "a_window_that_grows_forgets_nothing_that_was_booked_since",
    ),
    (
        "call('PEXPIRE', key, format('%.0f', left_ms))",
        "call('EXPIRE', key, ttl_s)",
        "a_reservation_prolongs_a_ttl_with_a_new_bucket_only",
    ),
    (
        "elseif call('PTTL', key) < left_ms then",
        "else",
        "a_window_is_kept_as_long_as_its_youngest_bucket_whatever_its_length_was",
    ),
    (
        "charge_window(KEYS[3], bucket, window_s + bucket_s)",
        "charge_window(KEYS[3], bucket, window_s)",
        "the_known_layout_of_keys",
    ),
    ("charge_window(KEYS[5], bucket, window_s + bucket_s)", "", "scopes_are_kept_apart"),
    ("charge_total(KEYS[6], network_daily, day_ends_s + 86400)", "", "scopes_are_kept_apart"),
    (
        "charge_total(KEYS[7], global_hourly, hour_ends_s + 7200)",
        "charge_total(KEYS[7], global_hourly, hour_ends_s)",
        "the_known_layout_of_keys",
    ),
    ("charge_total(KEYS[8], global_daily, day_ends_s + 86400)", "", "scopes_are_kept_apart"),
    ("for i = 9, 11 do\n  local held", "for i = 9, 10 do\n  local held", "the_known_layout_of_keys"),
    ("if pending[i] == cost then", "if true then", "pending_amounts_get_their_ttl_with_a_new_bucket_only"),
    (
        "call('EXPIRE', KEYS[i], pending_s + pending_bucket_s",
        "call('EXPIRE', KEYS[i], pending_s",
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
    ("if recent.over then", "if false then", "a_window_has_never_more_members_than_buckets_and_one"),
    ("if network_recent.over then", "if false then", "a_window_has_never_more_members_than_buckets_and_one"),
    (
        "if buckets.over then",
        "if false then",
        "what_killed_workers_leave_pending_makes_no_set_grow_and_is_reported_when_it_is_removed",
    ),
    (
        "if i == 11 then expired = buckets.over_total end",
        "",
        "reservations_report_expired_amounts_where_no_request_settles",
    ),
    (
        "if i == 11 then expired = buckets.over_total end",
        "expired = expired + buckets.over_total",
        "reservations_report_expired_amounts_where_no_request_settles",
    ),
    ("'EX', pending_s + RECORD_KEEP_S", "'EX', pending_s", "the_known_layout_of_keys"),
    ("ceil(window_s / 20)", "ceil(window_s / 19)", "the_known_layout_of_keys"),
    (
        "ceil(window_s / 20)",
        "floor(window_s / 20)",
        "a_window_that_is_no_multiple_of_its_buckets_is_as_long_as_it_says",
    ),
    ("ceil(pending_s / 12)", "ceil(pending_s / 11)", "the_known_layout_of_keys"),
    (
        "local until_us = now_us + pending_s * SECOND",
        "local until_us = now_us",
        "an_extension_leaves_the_key_of_another_request_alone",
    ),
    ("'EX', IDEMPOTENCY_KEEP_S)", "'EX', pending_s)", "the_key_of_a_request_that_did_not_end_in_time_is_expired"),
    (
        "if left + cost <= limit then return bucket.start + bucket_s + window_s end",
        "",
        "retry_after_is_never_early_and_at_most_a_bucket_late",
    ),
    (
        "then return bucket.start + bucket_s + window_s end",
        "then return bucket.start + window_s end",
        "retry_after_is_never_early_and_at_most_a_bucket_late",
    ),
]
EXTEND = [
    (
        "(i == 10 and tonumber(ARGV[17]) or 0)",
        "0",
        "an_extension_makes_a_lost_total_again_with_its_ttl",
    ),
    (
        "if request_digest ~= ARGV[3] then return { 9, 0, now_us } end",
        "",
        "an_end_or_extension_for_another_request_is_a_conflict",
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
        "math.min(made_at_us + pending_s * SECOND, (",
        "math.max(made_at_us + pending_s * SECOND, (",
        "what_has_ended_is_past_its_time_or_is_unknown_cannot_be_extended",
    ),
    (
        "(bucket + bucket_s + window_s) * SECOND)",
        "(bucket + window_s) * SECOND)",
        "a_reservation_may_be_extended_until_its_bucket_leaves_the_window",
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
        "and status == 0 then status = place.status end",
        "then status = place.status end",
        "an_extension_is_held_to_the_limits_of_its_own_hour_and_day",
    ),
    ("more = math.min(more, math.max(room, 0))", "", "of_several_limits_the_narrowest_says_how_much_there_is_room_for"),
    ("math.max(room, 0)", "room", "a_limit_lowered_below_what_is_spent_extends_nothing_and_takes_nothing_back"),
    (
        "local more, status = math.max(to - held, 0), 0",
        "local more, status = to - held, 0",
        "an_extension_sent_again_charges_nothing_more",
    ),
    (
        "local more, status = math.max(to - held, 0), 0",
        "local more, status = to, 0",
        "more_than_was_reserved_is_booked_and_returned_as_overrun",
    ),
    (
        "if status > 0 and at_least > held then",
        "if status > 0 then",
        "a_limit_lowered_below_what_is_spent_extends_nothing_and_takes_nothing_back",
    ),
    (
        "if status > 0 and at_least > held then",
        "if false then",
        "an_extension_exactly_to_a_limit_is_granted_and_one_nano_dollar_more_is_not",
    ),
    (
        "  { status = 2, at = 3, limit = tonumber(ARGV[12]), ends_s = DAY_ENDS_S + 86400, mine = true },\n",
        "",
        "an_extended_reservation_without_an_end_stays_booked_in_full",
    ),
    (
        "limit = tonumber(ARGV[11]), window",
        "limit = nil, window",
        "the_first_limit_that_fails_is_the_reason",
    ),
    (
        "limit = tonumber(ARGV[13]), window",
        "limit = nil, window",
        "the_first_limit_that_fails_is_the_reason",
    ),
    (
        "  { status = 5, at = 5, limit = tonumber(ARGV[14]), ends_s = DAY_ENDS_S + 86400 },\n",
        "",
        "of_several_limits_the_narrowest_says_how_much_there_is_room_for",
    ),
    (
        "limit = tonumber(ARGV[15]), ends_s",
        "limit = nil, ends_s",
        "the_first_limit_that_fails_is_the_reason",
    ),
    (
        "  { status = 7, at = 7, limit = tonumber(ARGV[16]), ends_s = DAY_ENDS_S + 86400 },\n",
        "",
        "the_first_limit_that_fails_is_the_reason",
    ),
    (
        "if flat[i] > over_text then total",
        "if true then total",
        "what_has_left_the_window_is_not_in_the_way_of_an_extension",
    ),
    (
        "local made_s = floor(made_at_us / SECOND)",
        "local made_s = floor(now_us / SECOND)",
        "an_extension_is_booked_in_the_periods_of_its_reservation",
    ),
    (
        "made_s - made_s % pending_bucket_s",
        "floor(now_us / SECOND) - floor(now_us / SECOND) % pending_bucket_s",
        "an_extension_prolongs_no_ttl",
    ),
    (
        "for i = is_cleared and 9 or 8, 10 do\n  local now",
        "for i = is_cleared and 9 or 8, 9 do\n  local now",
        "expired_amounts_are_reported_once",
    ),
    (
        "for i = is_cleared and 9 or 8, 10 do\n  local now",
        "for i = 8, 10 do\n  local now",
        "an_extension_of_what_was_cleared_is_charged_to_the_others_only",
    ),
    (
        "if place.mine and is_cleared then room = math.huge end",
        "",
        "an_extension_of_what_was_cleared_is_charged_to_the_others_only",
    ),
    (
        "  if place.mine and is_cleared then\n    --",
        "  if false then\n    --",
        "an_extension_of_what_was_cleared_is_charged_to_the_others_only",
    ),
    (
        "made_at_us <= reset_us",
        "made_at_us > reset_us",
        "a_reset_before_a_reservation_or_one_that_is_no_time_clears_nothing",
    ),
    (
        "if place.spent == 0 then call('EXPIRE'",
        "if false then call('EXPIRE'",
        "an_extension_makes_a_lost_total_again_with_its_ttl",
    ),
    (
        "if now_there == more and call('TTL', place.key) < window_s + bucket_s then",
        "if false then",
        "an_extension_makes_a_lost_total_again_with_its_ttl",
    ),
    (
        "if now_there == more and call('TTL', KEYS[i]) < ttl_s then",
        "if false then",
        "an_extension_makes_a_lost_total_again_with_its_ttl",
    ),
    (
        "made_at_us, request_digest, rest), 'KEEPTTL')",
        "made_at_us, request_digest, rest))",
        "an_extension_prolongs_no_ttl",
    ),
    (
        "held + more, made_at_us, request_digest",
        "to, made_at_us, request_digest",
        "an_extension_takes_what_there_is_room_for_if_that_is_enough",
    ),
    ("if rid == ARGV[18] then", "if rid then", "an_extension_leaves_the_key_of_another_request_alone"),
    ("if rid == ARGV[18] then", "if false then", "the_key_of_an_extended_request_shows_what_it_holds"),
    (
        "held + more, until_us), 'KEEPTTL')",
        "held + more, until_us), 'EX', 86400)",
        "the_ttl_of_an_idempotency_key_is_a_day_from_its_last_change",
    ),
    (
        "local mine = is_cleared and 0 or more",
        "local mine = more",
        "an_extension_of_what_was_cleared_is_charged_to_the_others_only",
    ),
]
SETTLE = [
    (
        "if state ~= 'open' then return { 1, tonumber(nanousd), now_us, 0 } end",
        "",
        "a_second_settlement_gets_the_first_answer_and_changes_nothing",
    ),
    (
        "if state ~= 'open' then return { 1, tonumber(nanousd), now_us, 0 } end",
        "if state ~= 'open' then return { 1, actual, now_us, 0 } end",
        "a_second_settlement_gets_the_first_answer_and_changes_nothing",
    ),
    (
        "if known_digest ~= request_digest then return { 9, 0, now_us, 0 } end",
        "",
        "an_end_or_extension_for_another_request_is_a_conflict",
    ),
    ("delta = actual - held", "delta = -held", "a_settlement_books_what_was_used"),
    ("held = tonumber(nanousd)", "held = actual", "a_refused_id_may_be_used_again"),
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
        "local status, delta, held = 0, actual, 0",
        "local status, delta, held = 0, 0, 0",
        "a_lost_record_and_booking_is_booked_late_and_once",
    ),
    ("math.max(delta, 0 - (amount or 0))", "delta", "no_total_goes_below_nothing"),
    ("0 - (amount or 0)", "-(amount or 0)", "taking_from_a_total_of_nothing_is_a_whole_settlement"),
    ("and (total.held or delta > 0)", "", "a_settlement_below_its_reservation_makes_no_missing_total"),
    ("and in_window and", "and", "what_has_left_the_window_is_not_extended_and_its_settlement_makes_nothing_anew"),
    (
        "if not total.held then call('EXPIRE'",
        "if false then call('EXPIRE'",
        "a_lost_record_and_booking_is_booked_late_and_once",
    ),
    ("if not total.held then call('EXPIRE'", "if true then call('EXPIRE'", "no_total_goes_below_nothing"),
    (
        "elseif not window.held and call('TTL', window.key) < window_s + bucket_s then",
        "elseif not window.held and call('TTL', window.key) < 0 then",
        "a_late_booking_outlives_an_older_bucket_beside_it",
    ),
    (
        "format('%.0f', made_s - made_s % bucket_s)",
        "format('%.0f', now_s - now_s % bucket_s)",
        "a_settlement_lands_in_the_periods_of_its_reservation",
    ),
    (
        "local now_s, made_s = floor(now_us / SECOND), floor(made_at_us / SECOND)",
        "local now_s = floor(now_us / SECOND)\nlocal made_s = now_s",
        "a_settlement_lands_in_the_periods_of_its_reservation",
    ),
    (
        "format('%.0f', made_s - made_s % pending_bucket_s)",
        "format('%.0f', now_s - now_s % pending_bucket_s)",
        "expired_amounts_are_reported_once",
    ),
    ("call('ZREM', window.key, bucket)", "", "books_and_reservations_say_when_the_oldest_amount_leaves_the_window"),
    ("if open.mine then", "if false then", "an_end_takes_no_more_than_its_own_pending_amount"),
    ("if #open.over > 0 then", "if false then", "retry_after_is_never_early_and_at_most_a_bucket_late"),
    (
        "if is_over or (own > 0 and amount <= own) then",
        "if own > 0 and amount <= own then",
        "expired_amounts_are_reported_once",
    ),
    ("if is_over then expired = expired + math.max(amount - own, 0) end", "", "expired_amounts_are_reported_once"),
    ("math.max(amount - own, 0)", "amount", "expired_amounts_are_reported_once"),
    (
        "pending_bucket_s + pending_s) * SECOND <= now_us",
        "pending_bucket_s + pending_s) * SECOND < now_us",
        "expired_amounts_are_reported_once",
    ),
    (
        "made_at_us, request_digest, ARGV[6], ARGV[8], ARGV[11], ARGV[12]),\n  'EX', keep_s)",
        "made_at_us, request_digest, ARGV[6], ARGV[8], ARGV[11], ARGV[12]))",
        "the_known_layout_of_keys",
    ),
    (
        "format('%s %s %.0f %s %s %s %s %s', ending, ARGV[4]",
        "format('%s %s %.0f %s %s %s %s %s', ending, held",
        "a_second_settlement_gets_the_first_answer_and_changes_nothing",
    ),
    ("  { place = 5, keep_until_s = DAY_ENDS_S + 86400 },\n", "", "a_settlement_books_what_was_used"),
    ("  { place = 6, keep_until_s = HOUR_ENDS_S + 7200 },\n", "", "a_settlement_books_what_was_used"),
    ("  { place = 7, keep_until_s = DAY_ENDS_S + 86400 },\n", "", "a_settlement_books_what_was_used"),
    ("local windows = { { place = 4 } }", "local windows = {}", "a_settlement_books_what_was_used"),
    ("  windows[#windows + 1] = { place = 2 }\n", "", "a_settlement_books_what_was_used"),
    (
        "  totals[#totals + 1] = { place = 3, keep_until_s = DAY_ENDS_S + 86400 }\n",
        "",
        "a_settlement_books_what_was_used",
    ),
    ("open_at(KEYS[9], true), ", "open_at(KEYS[9], false), ", "an_end_takes_no_more_than_its_own_pending_amount"),
    (
        "if not is_cleared then\n",
        "if true then\n",
        "what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them",
    ),
    (
        "open_at(KEYS[8], not is_cleared)",
        "open_at(KEYS[8], true)",
        "what_was_reserved_before_its_books_were_cleared_is_not_taken_from_them",
    ),
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
    ("(not known or owner == ARGV[14])", "true", "an_end_leaves_the_key_of_another_request_alone"),
    ("(not known or owner == ARGV[14])", "owner == ARGV[14]", "a_lost_record_and_booking_is_booked_late_and_once"),
    ("elseif owner == ARGV[14] then", "elseif known then", "an_end_leaves_the_key_of_another_request_alone"),
    (
        "elseif owner == ARGV[14] then",
        "elseif false then",
        "without_its_record_a_reservation_is_not_extended_and_a_release_books_nothing",
    ),
    (
        "if ending == 'settled' and",
        "if",
        "without_its_record_a_reservation_is_not_extended_and_a_release_books_nothing",
    ),
    (
        "format('settled %s %s %s %.0f', ARGV[13]",
        "format('open %s %s %s %.0f', ARGV[13]",
        "a_lost_record_and_booking_is_booked_late_and_once",
    ),
    ("now_us), 'EX', ARGV[15])", "now_us), 'EX', keep_s)", "a_key_is_kept_for_a_day_from_its_last_change"),
]
# The case that notices these is `test_reserve_with_a_key_of_another_kind`, for one of the keys.
OF_ANOTHER_KIND = [
    ("text = text or call('GET', KEYS[place])", ""),
    ("for i = 9, 11 do call('ZCARD', KEYS[i]) end", ""),
    ("redis.pcall('ZINCRBY'", "call('ZINCRBY'"),
    ("if type(held) == 'table' then", "if false then"),
    ("for j = 9, i - 1 do", "for j = 9, i - 2 do"),
    ("for j = 9, i - 1 do", "for j = 10, i - 1 do"),
    ("call('ZREM', KEYS[j], pending_bucket)", ""),
    ("call('ZINCRBY', KEYS[j], -cost, pending_bucket)", ""),
    ("if pending[j] == cost then", "if false then"),
    ("    return held\n", ""),
]
MUTANTS = [
    *(("reserve.lua", *mutant) for mutant in RESERVE),
    *(("extend.lua", *mutant) for mutant in EXTEND),
    *(("settle.lua", *mutant) for mutant in SETTLE),
]


@pytest.fixture
def suite(redis_url):
    suite = RedisLayout()
    suite.harness = RedisHarness("atomic", redis_url)
    yield suite
    suite.harness.close()


@pytest.mark.parametrize("case", sorted({case for *_, case in MUTANTS}))
def test_the_scripts_as_they_are_pass(suite, case):
    getattr(suite, f"test_{case}")()


def mutant_of(script, right, wrong):
    mutant = Script(script)
    assert mutant.text.count(right) == 1, "the script has changed: so must this mutant"
    mutant.text = mutant.text.replace(right, wrong)
    mutant.digest = hashlib.sha1(mutant.text.encode(), usedforsecurity=False).hexdigest()
    return mutant


@pytest.mark.parametrize(("script", "right", "wrong", "case"), MUTANTS, ids=lambda text: text.strip()[:40])
def test_a_wrong_in_a_script_is_noticed(monkeypatch, suite, script, right, wrong, case):
    mutant, run = mutant_of(script, right, wrong), getattr(suite, f"test_{case}")
    monkeypatch.setattr(atomic, f"_{script.split('.', maxsplit=1)[0].upper()}", mutant)
    try:
        run()
    except Exception:  # noqa: BLE001 (whatever it is, the mutant is noticed)
        return
    pytest.fail(f"{case} does not notice it")


@pytest.mark.parametrize(("right", "wrong"), OF_ANOTHER_KIND)
def test_a_key_of_another_kind_notices_it(monkeypatch, redis_url, right, wrong):
    monkeypatch.setattr(by_hand, "RESERVE", mutant_of("reserve.lua", right, wrong))

    def every_case():
        for name, limit, comes_first in product(by_hand.RESERVE_KEYS, (10**12, 0), (False, True)):
            client.flushdb()
            test_wrong_kinds.test_reserve_with_a_key_of_another_kind(client, name, limit, comes_first)

    with redis.Redis.from_url(redis_url) as client, pytest.raises((AssertionError, pytest.fail.Exception)):
        every_case()
