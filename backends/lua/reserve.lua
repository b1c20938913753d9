--[[
reserve: may this request spend at most `cost`? Every budget is charged, or none is.

KEYS  record          llm:reservation:<rid>      string  "<state> <nanousd> <made_at_us> <request_digest> <charged_to>"
      per budget      as keys.py makes it        string  nanousd, or zset: bucket start (unix s) -> nanousd: a window
      per window      llm:running:<its key>      string  "<window_s> <bucket> <buckets> <others> <oldest>": a hint; see the end
      per owner       llm:open:<scope>:<owner>   zset    member -> nanousd of pending reservations: a bucket's start (unix s), and
                      a colon and digests of what they are charged to of this owner, but where that is the six and nothing else
      marker          llm:throttle:<identifier>  string  "<cause> <until_us> <ends_at_us, 0: never> busy|spent"; unless ARGV 7 is ''
      idempotency     llm:idempotency:<digest>   string  "<state> <body> <rid> <nanousd> <until_us>"; only with `body`

ARGV  1  now_us           '' in production: Redis' own TIME; a number in tests
      2  deadline_us      Redis' time after which the caller has given up
      3  cost             nanousd, > 0
      4  at_least         nanousd that admit it where `cost` does not fit; '': all of `cost` or nothing
      5  request_digest   8 hex digits of what the id stands for; records of versions before have eight more
      6  charged_to       for the record: what it is charged to
      7  mark_when_busy   '1' or '0'; '': no identifier, so no marker
      8  counts           "<pending_s> <budgets> <windows> <owners> <everybody> <from_s> <until_s>": the longest that it may be pending;
                          how many there are; that owner's number, or 0; the keys are of periods that last from one to the other
      9  budgets          of each "<limit, nanousd; none: nothing>,<window_s, 0: a total> "
     10  shares           of each that can refuse "<a budget's number>,<number of what it is a share of>,<millionths> "
     11  plan             of each "<its owner's number>,<marker_s>,<1: shadow>,<status>,<start_s>,<end_s>,<keep_until_s>,<cause> ";
                          the times are 0 for a window, and where a period never ends
     12  pending          of each owner "<what follows the start in the members of its pending money>,"; '' where that is nothing for all
     13  body             digest of what was asked         14  rid   both only with an idempotency key
                          What belongs together is one word, since each takes time.

Reply {status, ttl_or_duration, now_us, ...}
  0  admitted:            pending_s, now_us, made_at_us, nanousd held, expired nanousd, numbers of the shadow budgets that have
                          no room, '', of each budget nanousd with this one, of each window when its oldest amount leaves (unix s)
                          (an id that is known: pending_s as it was then, and charged_to in place of '')
  1  under a marker:      seconds left of it, now_us, seconds until it can end, busy, its cause ('': set by hand)
  2 to 7, 13  refused:    marker seconds (0: none set), now_us, seconds until it can end (0: never), busy, the budget's number
 14  refused by a share:  the same, with the number of the budget whose owner has the share; no marker
  8  this id has ended:   0, now_us, nanousd booked        9  it stands for something else: 0, now_us
 10  too late, the caller has given up: 0, now_us         11  the keys are of other periods than Redis' time: 0, now_us
 12  the idempotency key is taken: 0, now_us, 1 in flight | 2 settled | 3 expired, nanousd booked, same body (0, 1), rid

Worked example: one window with the limit 20000000, three pending reservations of 4050000 in it, cost 4050000:
12150000 + 4050000 <= 20000000, so {0, 120, now, now, 4050000, 0, '', '', 16200000, ...}; the fifth gets {3, 30, now, 30, 1, 1}.

Promise: reads and decides first, writes last. Whatever can be of the wrong kind has been read before the first write, but for
the buckets of pending money, which decide nothing: they are charged first, and where one refuses, the others get back what
they had. A full or read-only server refuses the first write. No decision rests on a TTL. A bucket counts until its youngest
possible nano-dollar has left the window (n + 1 buckets), so a true window never exceeds the limit. All numbers stay below
2^53; amounts reach Redis as the strings that came in, or with every digit (%.0f).
A window takes time to read: what all its buckets but the present one come to is kept beside it. Whoever changes one of these
takes the hint away, and the present one is read each time. Another number of buckets, or a refusal, makes the script read all.
]]

local SECOND, LIVE_PENDING_BUCKETS, RECORD_KEEP_S, IDEMPOTENCY_KEEP_S, NEVER_S = 1000000, 13, 3600, 86400, 2 ^ 53
local HINT_KEEP_S, THE_SIX = 60, '...six' -- The latter as in records.py.
local call, tonumber, floor, ceil, max = redis.call, tonumber, math.floor, math.ceil, math.max
local format, match, find, sub, gmatch = string.format, string.match, string.find, string.sub, string.gmatch

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local now_s = floor(now_us / SECOND)
local cost, cost_text, body = tonumber(ARGV[3]), ARGV[3], ARGV[13]
local pending_s, BUDGETS, WINDOWS, OWNERS, EVERYBODY, from_s, until_s = match(ARGV[8], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
pending_s, BUDGETS, WINDOWS, OWNERS, EVERYBODY = tonumber(pending_s), tonumber(BUDGETS), tonumber(WINDOWS), tonumber(OWNERS), tonumber(EVERYBODY)
local PENDING = 1 + BUDGETS + WINDOWS
local LAST = PENDING + OWNERS
local MARKER = ARGV[7] ~= '' and KEYS[LAST + 1]
local pending_bucket_s = ceil(pending_s / 12) -- As in keys.py.

-- Into `found`, whose buckets count until `lasts_s` after their start: the total of those that do, their number, the oldest, the
-- present one, those that are over and their total, all as read. Starts are ten digits, so they compare as text, which takes a
-- third of the time; what follows the start of pending money makes it greater, and not as great as the next second.
local function read_buckets(found, key, lasts_s)
  local flat, since_text = call('ZRANGE', key, '0', '-1', 'WITHSCORES'), format('%010.0f', floor(now_us / SECOND - lasts_s) + 1)
  local total, oldest, over, over_total = 0, 'none', nil, 0
  for i = 1, #flat, 2 do
    local start, held = flat[i], flat[i + 1]
    if start >= since_text then
      total = total + held
      if start < oldest then oldest = start end
      if start == found.bucket then found.present = held end
    else
      over, over_total = over or {}, over_total + held
      over[#over + 1] = start
    end
  end
  found.total, found.oldest, found.buckets, found.is_known = total, oldest, #flat / 2 - (over and #over or 0), false
  found.over, found.over_total, found.flat, found.since_text = over, over_total, flat, since_text
  return found
end

local function window_at(key, window_s, hint_key, hint)
  local bucket_s = ceil(window_s / 20) -- As in keys.py.
  local lasts_s, bucket = bucket_s + window_s, format('%.0f', now_s - now_s % bucket_s)
  local head = window_s .. ' ' .. bucket
  local buckets, others, oldest = match(hint or '', '^' .. head .. ' (%d+) (%d+) (%d+)$')
  local is_usable = buckets and oldest + lasts_s > now_us / SECOND and call('ZCARD', key) == tonumber(buckets)
  local present = is_usable and call('ZSCORE', key, bucket)
  -- All at once: a table that grows takes time.
  local window = { key = key, hint_key = hint_key, head = head, bucket = bucket, bucket_s = bucket_s, lasts_s = lasts_s,
    is_known = present and true, total = present and others + present, oldest = oldest }
  return present and window or read_buckets(window, key, lasts_s)
end

-- What `own` nanousd leave of a share, rounded down: exact below 2^53, where limit * millionths would not be.
local function left_of_share(own, whole, limit, millionths)
  local rest = limit - max(0, whole - own)
  return millionths * floor(rest / 1e6) + floor(millionths * (rest % 1e6) / 1e6) - own
end

-- Read and decide: the caller, the periods, the id, the marker.

if now_us > tonumber(ARGV[2]) then return { 10, 0, now_us } end
if now_s < tonumber(from_s) or now_s >= tonumber(until_s) then return { 11, 0, now_us } end

-- MGET takes a key of another kind for a missing one: what it calls missing is asked for again by GET, which raises that
-- before the INCRBY below would. An error names the place and not the key: that holds an identifier, which must not
-- reach a log whole.
local texts = call('MGET', unpack(KEYS, 2, PENDING))
local windows, spent, limits, fits, number, hints = {}, {}, {}, true, 0, BUDGETS -- By the budget's number; a total has no window.
for limit, window_s in gmatch(ARGV[9], '(%d*),(%d+) ') do
  number = number + 1
  if window_s ~= '0' then
    hints = hints + 1
    windows[number] = window_at(KEYS[1 + number], window_s, KEYS[1 + hints], texts[hints])
    spent[number] = windows[number].total
  else
    local text = texts[number] or call('GET', KEYS[1 + number])
    if text and (not find(text, '^%d+$') or #text > 16) then error('KEYS ' .. 1 + number .. ' holds no amount') end
    spent[number] = tonumber(text or 0)
  end
  limits[number] = tonumber(limit) or math.huge
  fits = fits and spent[number] + cost <= limits[number]
end
for number, of, millionths in gmatch(ARGV[10], '(%d+),(%d+),(%d+) ') do
  number, of = tonumber(number), tonumber(of)
  fits = fits and cost <= left_of_share(spent[number], spent[of], limits[of], millionths)
end

local function admitted(its_pending_s, made_at_us, held, expired, without_room, its_charged_to, more)
  local reply = { 0, its_pending_s, now_us, made_at_us, held, expired, without_room, its_charged_to }
  for i = 1, BUDGETS do reply[8 + i] = spent[i] + more end
  for i = 1, BUDGETS do
    if windows[i] then reply[#reply + 1] = (tonumber(windows[i].oldest) or tonumber(windows[i].bucket)) + windows[i].lasts_s end
  end
  return reply
end

-- Mostly there is neither record nor marker nor idempotency key.
local is_any = call('EXISTS', KEYS[1], unpack(KEYS, LAST + 1)) > 0
local record, marker, known = is_any and call('GET', KEYS[1]), is_any and MARKER and call('GET', MARKER), is_any and body and call('GET', KEYS[#KEYS])
if record then
  local state, nanousd, made_at_us, known_digest, its = match(record, '^(%a+) (%d+) (%d+) (%x%x%x%x%x%x%x%x)%x* (.*)$')
  if known_digest ~= ARGV[5] then return { 9, 0, now_us } end
  if state ~= 'open' then return { 8, 0, now_us, tonumber(nanousd) } end
  return admitted(tonumber(match(its, '^%d+ (%d+)')), tonumber(made_at_us), tonumber(nanousd), 0, '', its, 0)
end

if known then
  -- A text that was set by hand stands for an unknown request.
  local state, its_body, its_rid, nanousd, until_us = match(known, '^(%a+) (%x+) (%S+) (%d+) (%d+)$')
  local code = state == 'settled' and 2 or (state and tonumber(until_us) <= now_us) and 3 or 1
  return { 12, 0, now_us, code, tonumber(nanousd or 0), its_body == body and 1 or 0, its_rid or '' }
end

local plan
local function planned(number)
  if not plan then
    plan = {}
    local digests, next_digest = match(ARGV[6], '%S*$'), 1 -- What a record says of further budgets.
    for owner, marker_s, shadow, status, start_s, end_s, keep_until_s, cause in
      gmatch(ARGV[11], '(%d+),(%d+),(%d),(%d+),(%d+),(%d+),(%d+),(%S+) ') do
      local is_further = status == '13'
      plan[#plan + 1] = { number = #plan + 1, pending = KEYS[PENDING + owner], marker_s = tonumber(marker_s), is_shadow = shadow == '1', status = tonumber(status),
        start_s = tonumber(start_s), end_s = tonumber(end_s), keep_until_s = tonumber(keep_until_s), cause = cause,
        digest = is_further and sub(digests, next_digest, next_digest + 5) or THE_SIX }
      if is_further then next_digest = next_digest + 6 end
    end
  end
  return plan[number]
end

if marker then
  local cause, until_us, ends_at_us, busy = match(marker, '^([%w_:]+) (%d+) (%d+) (%a+)$')
  local left_s = cause and ceil((until_us - now_us) / SECOND)
  if not cause then
    -- Set by hand: it throttles until its TTL ends; without one, as long as the shortest that a budget sets.
    local left_ms, shortest_s = call('PTTL', MARKER), NEVER_S
    for i = 1, BUDGETS do shortest_s = planned(i).marker_s > 0 and math.min(shortest_s, planned(i).marker_s) or shortest_s end
    left_s = left_ms >= 0 and ceil(left_ms / 1000) or shortest_s < NEVER_S and shortest_s or 1
    return { 1, left_s, now_us, left_s, 0, '' }
  elseif left_s > 0 then
    local wait_s = ends_at_us ~= '0' and max(left_s, ceil((ends_at_us - now_us) / SECOND)) or 0
    return { 1, left_s, now_us, wait_s, busy == 'busy' and 1 or 0, cause }
  end
end

-- Refuse, or reserve less: every limit is checked, in the order in which refusals name them, since the latest end of all
-- that fail counts. All of it stands inside the condition: an admitted request does not pay for making these functions.

local without_room = ''
if not fits then
  -- An admitted request finds out by its writes whether these are of the wrong kind.
  for i = 1, OWNERS do call('ZCARD', KEYS[PENDING + i]) end
  for i, window in pairs(windows) do
    if window.is_known then spent[i] = read_buckets(window, window.key, window.lasts_s).total end
  end

  -- Pending money that was charged to this budget, in buckets that end later than `since_s`, is in the limit. Where a window
  -- is hardly longer than an answer may take, expired money may leave it before it leaves the pending buckets: only what is
  -- surely in both counts.
  local function pending_in(number)
    local window, total = windows[number], 0
    local since_s = window and now_s - window.lasts_s + window.bucket_s + pending_bucket_s - 1 or planned(number).start_s
    local digest, pending = planned(number).digest, read_buckets({}, planned(number).pending, pending_bucket_s + pending_s)
    for i = 1, #pending.flat, 2 do
      local member = pending.flat[i]
      local is_charged = find(member, digest, 12, true) or (digest == THE_SIX and #member == 10)
      local is_in = member >= pending.since_text and sub(member, 1, 10) + pending_bucket_s > since_s
      if is_charged and is_in then total = total + pending.flat[i + 1] end
    end
    return total
  end

  local function fits_at_s(number)
    local window, live = windows[number], {}
    if not window then return planned(number).end_s > 0 and planned(number).end_s or NEVER_S end
    for i = 1, #window.flat, 2 do
      if window.flat[i] >= window.since_text then live[#live + 1] = { start = tonumber(window.flat[i]), held = tonumber(window.flat[i + 1]) } end
    end
    table.sort(live, function(one, other) return one.start < other.start end)
    local left, fits_s = window.total, 0
    for _, bucket in ipairs(live) do
      if left + cost > limits[number] then left, fits_s = left - bucket.held, bucket.start + window.lasts_s end
    end
    return fits_s
  end

  -- All that may refuse: shares before the first budget that is shared.
  local bounds, shares, first_shared = {}, {}, BUDGETS
  for number, of, millionths in gmatch(ARGV[10], '(%d+),(%d+),(%d+) ') do
    shares[#shares + 1] = { number = tonumber(number), of = tonumber(of), millionths = millionths, status = 14, marker_s = 0 }
    first_shared = math.min(first_shared, of)
  end
  for i = 1, BUDGETS do
    for _, share in ipairs(i == first_shared and shares or {}) do bounds[#bounds + 1] = share end
    if not planned(i).is_shadow then bounds[#bounds + 1] = planned(i) end
  end

  -- How much more may be booked where `held_in(number)` is what is booked of each.
  local function left_of(bound, held_in)
    local number, of = bound.number, bound.of
    if of then return left_of_share(held_in(number), held_in(of), limits[of], bound.millionths) end
    return limits[number] - held_in(number)
  end
  local function nothing() return 0 end
  local function now(number) return spent[number] end
  local function once_pending_has_ended(number) return spent[number] - pending_in(number) end

  local refusing, busy, ends_at_s, room, never_fits
  local function check_all()
    refusing, busy, ends_at_s, room, never_fits = nil, true, 0, math.huge, false
    for _, bound in ipairs(bounds) do
      local left = left_of(bound, now)
      room, never_fits = math.min(room, left), never_fits or cost > left_of(bound, nothing)
      if cost > left then
        refusing = refusing or bound
        busy = busy and cost <= left_of(bound, once_pending_has_ended)
        ends_at_s = max(ends_at_s, fits_at_s(bound.number))
      end
    end
  end
  check_all()

  -- `cost` will not fit when pending reservations end, so less may do.
  if refusing and not busy and ARGV[4] ~= '' then
    cost = tonumber(ARGV[4])
    check_all()
    if not refusing then cost, cost_text = room, format('%.0f', room) end
  end

  if refusing then
    -- Nothing that was spent stands in the way of what can never fit: its marker ends by itself.
    local wait_s = (busy or never_fits) and 1 or ends_at_s == NEVER_S and 0 or max(1, ceil(ends_at_s - now_us / SECOND))
    local marker_s = (busy and ARGV[7] ~= '1') and 0 or refusing.marker_s
    if marker_s > 0 then
      wait_s = wait_s > 0 and max(wait_s, marker_s) or 0
      call('SET', MARKER, format('%s %.0f %.0f %s', refusing.cause, now_us + marker_s * SECOND, wait_s > 0 and now_us + wait_s * SECOND or 0,
        busy and 'busy' or 'spent'), 'EX', marker_s)
    end
    return { refusing.status, marker_s, now_us, wait_s, busy and 1 or 0, refusing.number }
  end
  for i = 1, BUDGETS do
    if spent[i] + cost > limits[i] then without_room = without_room .. i .. ' ' end
  end
end

-- Write: the pending money first. A server that takes no writes refuses here; whichever key refuses, nothing stays changed.

local pending_bucket, expired, is_new, members = format('%.0f', now_s - now_s % pending_bucket_s), 0, {}, {}
local suffix = gmatch(ARGV[12], '([^,]*),')
for i = 1, OWNERS do
  members[i] = pending_bucket .. (suffix() or '')
  local held = redis.pcall('ZINCRBY', KEYS[PENDING + i], cost_text, members[i])
  if type(held) == 'table' then
    for j = 1, i - 1 do
      local key = KEYS[PENDING + j]
      if is_new[j] then call('ZREM', key, members[j]) else call('ZINCRBY', key, -cost, members[j]) end
    end
    return held
  end
  is_new[i] = tonumber(held) == cost
end

-- A key of pending money gets its TTL with each new member. pending_s changes with a restart at most, so the TTL outlasts
-- the bucket; else busy may be reported as spent for once. Everybody's is kept as long as records are: the first request after
-- a lull reports what has expired before it. Settlements remove what is over; where none come (workers that are killed),
-- a reservation with a new member does. What is over in everybody's has expired, and is reported once.
for i = 1, OWNERS do
  if is_new[i] then
    local key = KEYS[PENDING + i]
    call('EXPIRE', key, pending_s + pending_bucket_s + (i == EVERYBODY and RECORD_KEEP_S or 0))
    if call('ZCARD', key) > LIVE_PENDING_BUCKETS + 1 then
      local pending = read_buckets({}, key, pending_bucket_s + pending_s)
      if pending.over then call('ZREM', key, unpack(pending.over)) end
      if i == EVERYBODY then expired = pending.over_total end
    end
  end
end

call('SET', KEYS[1], format('open %s %.0f %s %s', cost_text, now_us, ARGV[5], ARGV[6]), 'EX', pending_s + RECORD_KEEP_S)
if body then
  call('SET', KEYS[#KEYS], format('open %s %s %s %.0f', body, ARGV[14], cost_text, now_us + pending_s * SECOND), 'EX', IDEMPOTENCY_KEEP_S)
end

-- A total gets its TTL with its first amount, a window with each new bucket. Where that ends before the bucket does (the
-- window has grown since), it is lengthened to the bucket's own end: a window outlasts its youngest bucket.
for i = 1, BUDGETS do
  local key, window = KEYS[1 + i], windows[i]
  if not window then
    call('INCRBY', key, cost_text)
    if spent[i] == 0 and planned(i).keep_until_s > 0 then call('EXPIRE', key, planned(i).keep_until_s - now_s) end
  elseif call('ZINCRBY', key, cost_text, window.bucket) and not window.is_known then
    local left_ms, present = (window.bucket + window.lasts_s) * 1000 - floor(now_us / 1000), window.present
    if not present then
      call('EXPIRE', key, window.lasts_s)
    elseif call('PTTL', key) < left_ms then
      call('PEXPIRE', key, format('%.0f', left_ms))
    end
    if window.over then call('ZREM', key, unpack(window.over)) end
    call('SET', window.hint_key, format('%s %d %.0f %s', window.head, window.buckets + (present and 0 or 1), window.total - (present or 0),
      window.oldest < window.bucket and window.oldest or window.bucket), 'EX', math.min(window.bucket_s, HINT_KEEP_S))
  end
end

return admitted(pending_s, now_us, cost, expired, without_room, '', cost)
