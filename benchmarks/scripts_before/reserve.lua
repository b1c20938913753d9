--[[
reserve: may this request spend at most `cost`? Every scope is charged, or none is.

KEYS  1  llm:reservation:<rid>               string  "<state> <nanousd> <made_at_us> <request_digest> <window_s> <pending_s> <who> <network>"
      2  llm:throttle:<id>                   string  "<cause> <until_us> <ends_at_us> busy|spent"
      3  llm:cost:recent:<id>                zset    bucket start (unix s) -> nanousd
      4  llm:cost:daily:<id>:<date>          string  nanousd
      5  llm:network:recent:<net>            zset    as 3
      6  llm:network:daily:<net>:<date>      string  nanousd
      7  llm:global:hourly:<date>T<hour>     string  nanousd
      8  llm:global:daily:<date>             string  nanousd
      9  llm:open:identifier:<id>            zset    bucket start (unix s) -> nanousd of pending reservations
     10  llm:open:network:<net>              zset    as 9
     11  llm:open:global                     zset    as 9
     12  llm:idempotency:<digest>            string  "<state> <body> <rid> <nanousd> <until_us>"; left out where none was sent

ARGV  1  now_us           '' in production: Redis' own TIME; a number in tests
      2  deadline_us      Redis' time after which the caller has given up
      3  hour             unix hour that the dated keys were made for
      4  cost             nanousd, > 0
      5  request_digest   digest of what the id stands for
      6  window_s         length of the window
      7  limits, nanousd: window of the identifier  8  its day
      9  window of the network                     10  its day           ('' is no limit, here only)
     11  everybody's hour                          12  everybody's day
     13  throttle_s       TTL of a marker          14  mark_when_busy    '1' or '0'
     15  pending_s        the longest that a reservation may be pending
     16  owners           digests of the identifier and of the network, as the record has them
     17  at_least         nanousd that admit it where `cost` does not fit; '': all of `cost` or nothing
     18  body             digest of what was asked 19  rid               (both with KEYS 12)
     Each word that is sent takes time at both ends, so what follows from others, or never changes, is not.

Reply {status, ttl_or_duration, now_us, ...}
  0  admitted:            pending_s, now_us, made_at_us, window nanousd, day nanousd (both with this one),
                          unix s at which the oldest amount leaves the window, nanousd held, expired nanousd, window_s
                          (an id that is known: pending_s and window_s as they were when it was admitted)
  1  under a marker:      seconds left of it, now_us, seconds until it can end, busy, status that set it
  2  daily limit, 3 window limit: marker seconds (0: none set), now_us, seconds until it can end, busy, status
  4  network's window, 5 network's day, 6 everybody's hour, 7 everybody's day: the same, no marker ever
  8  this id has ended:   0, now_us, nanousd booked
  9  this id stands for something else: 0, now_us
 10  too late, the caller has given up: 0, now_us
 11  the dated keys are of another hour than Redis': 0, now_us
 12  the idempotency key is taken: 0, now_us, 1 in flight | 2 settled | 3 expired, nanousd booked, same body (0, 1), rid

Worked example: window limit 20000000, three pending reservations of 4050000 in it, cost 4050000:
12150000 + 4050000 <= 20000000, so {0, 120, now, now, 16200000, ...}; the fifth gets {3, 30, now, 30, 1, 3}.
Were they settled, and at_least 3000000, the fifth would be admitted with the 3800000 that are left.

Promise: reads and decides first, writes last. Whatever can be of the wrong kind has been read before the first write,
but for the buckets of pending money, which decide nothing: they are charged first, and where one refuses, the others get
back what they had. A full or read-only server refuses the first write. No decision rests on a TTL: those only collect what is
over.
A bucket counts until its youngest possible nano-dollar has left the window (n + 1 buckets), so a true window never exceeds
the limit. All numbers stay below 2^53; amounts reach Redis as the strings that came in, or with every digit (%.0f).
]]

local REASONS = { [2] = 'daily_limit', [3] = 'window_limit' }
local STATUS_OF = { daily_limit = 2, window_limit = 3 }
local SECOND, LIVE_PENDING_BUCKETS, RECORD_KEEP_S, IDEMPOTENCY_KEEP_S = 1000000, 13, 3600, 86400
local call, tonumber, floor, ceil, format, find = redis.call, tonumber, math.floor, math.ceil, string.format, string.find

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local now_s = floor(now_us / SECOND)
local hour = floor(now_s / 3600)
local cost, cost_text, request_digest = tonumber(ARGV[4]), ARGV[4], ARGV[5]
local window_s, pending_s = tonumber(ARGV[6]), tonumber(ARGV[15])
-- As in keys.py.
local bucket_s, pending_bucket_s = ceil(window_s / 20), ceil(pending_s / 12)

-- Buckets that start up to here are over. A bucket counts until its start + its length + `ttl_s`.
-- Starts are ten digits, so they compare as text; that is a third of the time of a full window.
local function over_after(length_s, ttl_s)
  return format('%010.0f', floor(now_us / SECOND - length_s - ttl_s))
end

-- {total of the buckets that count, the oldest of them, those that are over and their total, all as read}.
-- Mostly none is over: then one comparison a bucket is enough, which is where the time of a full window goes.
local function buckets_at(key, over_text)
  local flat = call('ZRANGE', key, '0', '-1', 'WITHSCORES')
  local total, oldest = 0, 'none'
  for i = 1, #flat, 2 do
    total = total + flat[i + 1]
    if flat[i] < oldest then oldest = flat[i] end
  end
  if oldest > over_text then
    return { total = total, oldest = oldest, over_total = 0, flat = flat, over_text = over_text }
  end
  local over, over_total = {}, 0
  oldest = 'none'
  for i = 1, #flat, 2 do
    if flat[i] > over_text then
      if flat[i] < oldest then oldest = flat[i] end
    else
      over[#over + 1] = flat[i]
      over_total = over_total + flat[i + 1]
    end
  end
  return { total = total - over_total, oldest = oldest, over = over, over_total = over_total, flat = flat, over_text = over_text }
end

-- Read and decide: the caller, the period, the id, the marker.

if now_us > tonumber(ARGV[2]) then return { 10, 0, now_us } end
if hour ~= tonumber(ARGV[3]) then return { 11, 0, now_us } end

-- MGET takes a key of another kind for a missing one: what it calls missing is asked for again by GET, which raises that
-- before the INCRBY below would. An error names the place and not the key: that holds an identifier, which must not
-- reach a log whole.
local totals = call('MGET', KEYS[4], KEYS[6], KEYS[7], KEYS[8])
local function amount_at(place, text)
  text = text or call('GET', KEYS[place])
  if not text then return 0 end
  if not find(text, '^%d+$') or #text > 16 then error('KEYS ' .. place .. ' holds no amount') end
  return tonumber(text)
end

local record, marker = call('GET', KEYS[1]), call('GET', KEYS[2])
local daily, network_daily = amount_at(4, totals[1]), amount_at(6, totals[2])
local global_hourly, global_daily = amount_at(7, totals[3]), amount_at(8, totals[4])
local over_text = over_after(bucket_s, window_s)
local recent = buckets_at(KEYS[3], over_text)

local function frees_at_s(oldest)
  return (tonumber(oldest) or now_s - now_s % bucket_s) + bucket_s + window_s
end

if record then
  local state, nanousd, made_at_us, known_digest, its_window_s, its_open_s =
    string.match(record, '^(%a+) (%d+) (%d+) (%x+) (%d+) (%d+) ')
  if known_digest ~= request_digest then return { 9, 0, now_us } end
  if state ~= 'open' then return { 8, 0, now_us, tonumber(nanousd) } end
  return { 0, tonumber(its_open_s), now_us, tonumber(made_at_us), recent.total, daily, frees_at_s(recent.oldest),
    tonumber(nanousd), 0, tonumber(its_window_s) }
end

if KEYS[12] then
  local known = call('GET', KEYS[12])
  if known then
    -- A text that was set by hand stands for an unknown request.
    local state, body, rid, nanousd, until_us = string.match(known, '^(%a+) (%x+) (%S+) (%d+) (%d+)$')
    local code = state == 'settled' and 2 or (state and tonumber(until_us) <= now_us) and 3 or 1
    return { 12, 0, now_us, code, tonumber(nanousd or 0), body == ARGV[18] and 1 or 0, rid or '' }
  end
end

if marker then
  local cause, until_us, ends_at_us, busy = string.match(marker, '^([%a_]+) (%d+) (%d+) (%a+)$')
  if not cause then
    -- Set by hand: it throttles until its TTL ends.
    local left_ms = call('PTTL', KEYS[2])
    local left_s = left_ms >= 0 and ceil(left_ms / 1000) or tonumber(ARGV[13])
    return { 1, left_s, now_us, left_s, 0, 3 }
  end
  local left_s = ceil((until_us - now_us) / SECOND)
  if left_s > 0 then
    local wait_s = math.max(left_s, ceil((ends_at_us - now_us) / SECOND))
    return { 1, left_s, now_us, wait_s, busy == 'busy' and 1 or 0, STATUS_OF[cause] or 3 }
  end
end

local network_recent = buckets_at(KEYS[5], over_text)

-- Decide.

local NO_LIMIT = math.huge
local day_limit, window_limit = tonumber(ARGV[8]), tonumber(ARGV[7])
local network_limit, network_day_limit = tonumber(ARGV[9]) or NO_LIMIT, tonumber(ARGV[10]) or NO_LIMIT
local global_hour_limit, global_day_limit = tonumber(ARGV[11]), tonumber(ARGV[12])
local day_ends_s, hour_ends_s = (floor(now_s / 86400) + 1) * 86400, (hour + 1) * 3600

local fits = daily + cost <= day_limit
  and recent.total + cost <= window_limit
  and network_recent.total + cost <= network_limit
  and network_daily + cost <= network_day_limit
  and global_hourly + cost <= global_hour_limit
  and global_daily + cost <= global_day_limit

-- Refuse, or reserve less: every limit is checked, in the order in which refusals name them, since the latest end of all
-- that fail counts.
-- All of it stands inside the condition: an admitted request does not pay for making these functions.

if not fits then
  -- An admitted request finds out by its writes whether these are of the wrong kind.
  for i = 9, 11 do call('ZCARD', KEYS[i]) end

  local function pending_since(key, since_s)
    local buckets = buckets_at(key, over_after(pending_bucket_s, pending_s))
    local total = 0
    for i = 1, #buckets.flat, 2 do
      if buckets.flat[i] > buckets.over_text and buckets.flat[i] + pending_bucket_s > since_s then total = total + buckets.flat[i + 1] end
    end
    return total
  end

  local function window_fits_at_s(buckets, limit)
    local live = {}
    for i = 1, #buckets.flat, 2 do
      if buckets.flat[i] > buckets.over_text then
        live[#live + 1] = { start = tonumber(buckets.flat[i]), held = tonumber(buckets.flat[i + 1]) }
      end
    end
    table.sort(live, function(one, other) return one.start < other.start end)
    local left = buckets.total
    for _, bucket in ipairs(live) do
      left = left - bucket.held
      if left + cost <= limit then return bucket.start + bucket_s + window_s end
    end
    return now_s + window_s + bucket_s
  end

  -- Pending money in buckets that end later than these is in the limit. Where the window is hardly longer than an answer
  -- may take, expired money may leave the window before it leaves the pending buckets: only what is surely in both counts.
  local day_s, hour_s, in_window_s = day_ends_s - 86400, hour_ends_s - 3600, now_s - window_s + pending_bucket_s - 1
  local status, busy, ends_at_s
  local function check(its_status, spent, limit, pending_key, since_s, its_end_s, buckets)
    if spent + cost <= limit then return end
    if status == 0 then status = its_status end
    busy = busy and spent - pending_since(pending_key, since_s) + cost <= limit
    ends_at_s = math.max(ends_at_s, its_end_s or window_fits_at_s(buckets, limit))
  end
  local function check_all()
    status, busy, ends_at_s = 0, true, 0
    check(2, daily, day_limit, KEYS[9], day_s, day_ends_s)
    check(3, recent.total, window_limit, KEYS[9], in_window_s, nil, recent)
    check(4, network_recent.total, network_limit, KEYS[10], in_window_s, nil, network_recent)
    check(5, network_daily, network_day_limit, KEYS[10], day_s, day_ends_s)
    check(6, global_hourly, global_hour_limit, KEYS[11], hour_s, hour_ends_s)
    check(7, global_daily, global_day_limit, KEYS[11], day_s, day_ends_s)
  end
  check_all()

  -- `cost` will not fit when pending reservations end, so less may do.
  local at_least, room = tonumber(ARGV[17]), nil
  if at_least and not busy then
    room = math.min(day_limit - daily, window_limit - recent.total, network_limit - network_recent.total,
      network_day_limit - network_daily, global_hour_limit - global_hourly, global_day_limit - global_daily)
    cost = at_least
    check_all()
  end

  if status > 0 then
    -- Nothing that was spent stands in the way of what can never fit: its marker ends by itself.
    local never_fits = cost > day_limit or cost > window_limit or cost > network_limit or cost > network_day_limit
      or cost > global_hour_limit or cost > global_day_limit
    local wait_s = (busy or never_fits) and 1 or math.max(1, ceil(ends_at_s - now_us / SECOND))
    if status > 3 then return { status, wait_s, now_us, wait_s, busy and 1 or 0, status } end
    if busy and ARGV[14] ~= '1' then return { status, 0, now_us, wait_s, 1, status } end
    local marker_s = tonumber(ARGV[13]) * (status == 2 and 2 or 1)
    wait_s = math.max(wait_s, marker_s)
    call('SET', KEYS[2], format('%s %.0f %.0f %s', REASONS[status], now_us + marker_s * SECOND,
      now_us + wait_s * SECOND, busy and 'busy' or 'spent'), 'EX', marker_s)
    return { status, marker_s, now_us, wait_s, busy and 1 or 0, status }
  end
  cost, cost_text = room, format('%.0f', room)
end

-- Write: the pending money first. A server that takes no writes refuses here; whichever key refuses, nothing stays changed.

local pending_bucket = format('%.0f', now_s - now_s % pending_bucket_s)
local pending = {}
for i = 9, 11 do
  local held = redis.pcall('ZINCRBY', KEYS[i], cost_text, pending_bucket)
  if type(held) == 'table' then
    for j = 9, i - 1 do
      if pending[j] == cost then call('ZREM', KEYS[j], pending_bucket) else call('ZINCRBY', KEYS[j], -cost, pending_bucket) end
    end
    return held
  end
  pending[i] = tonumber(held)
end

-- A key of pending money gets its TTL with each new bucket. pending_s changes with a restart at most, so the TTL outlasts
-- the bucket; else busy may be reported as spent for once. The global key is kept as long as records are: the first request
-- after a lull reports what has expired before it. Settlements remove what is over; where none come (workers that are
-- killed), a reservation with a new bucket does. What is over in the global key has expired, and is reported once.
local expired = 0
for i = 9, 11 do
  if pending[i] == cost then
    call('EXPIRE', KEYS[i], pending_s + pending_bucket_s + (i == 11 and RECORD_KEEP_S or 0))
    if call('ZCARD', KEYS[i]) > LIVE_PENDING_BUCKETS + 1 then
      local buckets = buckets_at(KEYS[i], over_after(pending_bucket_s, pending_s))
      if buckets.over then call('ZREM', KEYS[i], unpack(buckets.over)) end
      if i == 11 then expired = buckets.over_total end
    end
  end
end

call('SET', KEYS[1], format('open %s %.0f %s %s %s %s', cost_text, now_us, request_digest, ARGV[6], ARGV[15], ARGV[16]),
  'EX', pending_s + RECORD_KEEP_S)
if KEYS[12] then
  local until_us = now_us + pending_s * SECOND
  call('SET', KEYS[12], format('open %s %s %s %.0f', ARGV[18], ARGV[19], cost_text, until_us), 'EX', IDEMPOTENCY_KEEP_S)
end

-- A total gets its TTL with its first amount, a window with each new bucket. Where that ends before the bucket does (the
-- window has grown since), it is lengthened to the bucket's own end: a window outlasts its youngest bucket.
local function charge_total(key, held_before, ends_at_s)
  call('INCRBY', key, cost_text)
  if held_before == 0 then call('EXPIRE', key, ends_at_s - now_s) end
end

local function charge_window(key, start, ttl_s)
  local is_new = tonumber(call('ZINCRBY', key, cost_text, start)) == cost
  local left_ms = (start + ttl_s) * 1000 - floor(now_us / 1000)
  if is_new then
    call('EXPIRE', key, ttl_s)
  elseif call('PTTL', key) < left_ms then
    call('PEXPIRE', key, format('%.0f', left_ms))
  end
end

local bucket = format('%.0f', now_s - now_s % bucket_s)
charge_window(KEYS[3], bucket, window_s + bucket_s)
charge_window(KEYS[5], bucket, window_s + bucket_s)
charge_total(KEYS[4], daily, day_ends_s + 86400)
charge_total(KEYS[6], network_daily, day_ends_s + 86400)
charge_total(KEYS[7], global_hourly, hour_ends_s + 7200)
charge_total(KEYS[8], global_daily, day_ends_s + 86400)
if recent.over then call('ZREM', KEYS[3], unpack(recent.over)) end
if network_recent.over then call('ZREM', KEYS[5], unpack(network_recent.over)) end

return { 0, pending_s, now_us, now_us, recent.total + cost, daily + cost, frees_at_s(recent.oldest), cost, expired, window_s }
