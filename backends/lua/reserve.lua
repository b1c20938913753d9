--[[
reserve: may this request spend at most `cost`? Every budget is charged, or none is.

KEYS  record          llm:reservation:<rid>      string  "<state> <nanousd> <made_at_us> <request_digest> <charged_to>"
      per budget      as keys.py makes it        string  nanousd, or zset: bucket start (unix s) -> nanousd: a window
      per window      llm:running:<its key>      string  "<window_s> <bucket> <buckets> <witness> <total> <oldest>"; see the end
      per owner       llm:open:<scope>:<owner>   zset    member -> nanousd of pending reservations: a bucket's start (unix s), and
                      a colon and digests of what they are charged to of this owner, but where that is the six and nothing else
      marker          llm:throttle:<identifier>  string  "<cause> <until_us> <ends_at_us, 0: never> busy|spent"; unless ARGV 10 is ''
      idempotency     llm:idempotency:<digest>   string  "<state> <body> <rid> <nanousd> <until_us>"; only with `body`

ARGV  1  now_us           '' in production: Redis' own TIME; a number in tests
      2  deadline_us      Redis' time after which the caller has given up
      3  from_s           4  until_s    unix s: the keys are those of periods that last from one to the other
      5  request_digest   digest of what the id stands for
      6  cost             nanousd, > 0
      7  at_least         nanousd that admit it where `cost` does not fit; '': all of `cost` or nothing
      8  pending_s        the longest that a reservation may be pending
      9  charged_to       for the record: what it is charged to
     10  mark_when_busy   '1' or '0'; '': no identifier, so no marker
     11  plan             of each budget "<its owner's number>,<marker_s>,<1: shadow>,<status>,<start_s>,<end_s>,<keep_until_s>,<cause> ";
                          the times are 0 for a window, and where a period never ends. It is one word, since each takes time.
     12  budgets          13  windows    14  owners   how many there are          15  everybody   that owner's number, or 0
     16  pending          of each owner "<what follows the start in the members of its pending money>,"; '' where that is nothing for all
     then per budget      limit, nanousd; '': none
     then per window      its budget's number, window_s, and its witness: the number of the total that it is always charged with, or 0
     then                 body: digest of what was asked, and rid; only with an idempotency key

Reply {status, ttl_or_duration, now_us, ...}
  0  admitted:            pending_s, now_us, made_at_us, nanousd held, expired nanousd, numbers of the shadow budgets that have
                          no room, '', of each budget nanousd with this one, of each window when its oldest amount leaves (unix s)
                          (an id that is known: pending_s as it was then, and charged_to in place of '')
  1  under a marker:      seconds left of it, now_us, seconds until it can end, busy, its cause ('': set by hand)
  2 to 7, 13  refused:    marker seconds (0: none set), now_us, seconds until it can end (0: never), busy, the budget's number
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
A long window takes time to read: what it came to is kept beside it, for as long as its youngest bucket is filled. What is
booked in it is booked in its witness too, so the total of now is that of then and the difference. A witness that came down,
another number of buckets, or a refusal makes the script read the buckets themselves.
]]

local SECOND, LIVE_PENDING_BUCKETS, RECORD_KEEP_S, IDEMPOTENCY_KEEP_S, NEVER_S = 1000000, 13, 3600, 86400, 2 ^ 53
local THE_SIX = '...six' -- As in records.py.
local call, tonumber, floor, ceil, max = redis.call, tonumber, math.floor, math.ceil, math.max
local format, match, find, sub = string.format, string.match, string.find, string.sub

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local now_s = floor(now_us / SECOND)
local cost, cost_text, pending_s = tonumber(ARGV[6]), ARGV[6], tonumber(ARGV[8])
local BUDGETS, WINDOWS, OWNERS, EVERYBODY = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])
local PENDING, LENGTHS = 1 + BUDGETS + WINDOWS, 16 + BUDGETS
local MARKER, body = ARGV[10] ~= '' and KEYS[PENDING + OWNERS + 1], ARGV[LENGTHS + 3 * WINDOWS + 1]
local pending_bucket_s = ceil(pending_s / 12) -- As in keys.py.

-- Buckets that start up to here are over. A bucket counts until its start + its length + `ttl_s`.
-- Starts are ten digits, so they compare as text; that is a third of the time of a full window.
local function over_after(length_s, ttl_s)
  return format('%010.0f', floor(now_us / SECOND - length_s - ttl_s))
end

-- Into `found`: the total of the buckets that count, their number, the oldest, those that are over and their total, all as read.
local function read_buckets(found, key, over_text)
  local flat, total, oldest, over, over_total = call('ZRANGE', key, '0', '-1', 'WITHSCORES'), 0, 'none', nil, 0
  for i = 1, #flat, 2 do
    if flat[i] > over_text then
      total = total + flat[i + 1]
      if flat[i] < oldest then oldest = flat[i] end
    else
      over, over_total = over or {}, over_total + flat[i + 1]
      over[#over + 1] = flat[i]
    end
  end
  found.total, found.oldest, found.buckets, found.is_known = total, oldest, #flat / 2 - (over and #over or 0), false
  found.over, found.over_total, found.flat, found.over_text = over, over_total, flat, over_text
  return found
end

-- Read and decide: the caller, the periods, the id, the marker.

if now_us > tonumber(ARGV[2]) then return { 10, 0, now_us } end
if now_s < tonumber(ARGV[3]) or now_s >= tonumber(ARGV[4]) then return { 11, 0, now_us } end

-- MGET takes a key of another kind for a missing one: what it calls missing is asked for again by GET, which raises that
-- before the INCRBY below would. An error names the place and not the key: that holds an identifier, which must not
-- reach a log whole.
local texts = BUDGETS > 0 and call('MGET', unpack(KEYS, 2, PENDING)) or {}
local record, marker = call('GET', KEYS[1]), MARKER and call('GET', MARKER)
local windows, spent, fits = {}, {}, true -- By the budget's number; a total has no window.
for at = LENGTHS + 1, LENGTHS + 3 * WINDOWS, 3 do
  local number, window_s, witness = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), texts[tonumber(ARGV[at + 2])]
  local key, bucket_s, known = KEYS[1 + number], ceil(window_s / 20), witness and texts[BUDGETS + (at - LENGTHS + 2) / 3] -- As in keys.py.
  local window = { key = key, bucket = format('%.0f', now_s - now_s % bucket_s), bucket_s = bucket_s, window_s = window_s, is_known = false, oldest = 'none', total = 0 }
  if known then
    local head = ARGV[at + 1] .. ' ' .. window.bucket .. ' ' .. call('ZCARD', key) .. ' '
    local was, total, oldest = match(known, '^(%d+) (%d+) (%d+)$', sub(known, 1, #head) == head and #head + 1 or #known)
    local more = was and witness - was
    if was and more >= 0 and oldest + bucket_s + window_s > now_us / SECOND then
      window.is_known, window.total, window.oldest = true, total + more, oldest
    end
  end
  if not window.is_known then read_buckets(window, key, over_after(bucket_s, window_s)) end
  windows[number], spent[number] = window, window.total
end
for i = 1, BUDGETS do
  local limit = tonumber(ARGV[16 + i])
  if not spent[i] then
    local text = texts[i] or call('GET', KEYS[1 + i])
    if text and (not find(text, '^%d+$') or #text > 16) then error('KEYS ' .. 1 + i .. ' holds no amount') end
    spent[i] = tonumber(text or 0)
  end
  if limit and spent[i] + cost > limit then fits = false end
end

local function admitted(its_pending_s, made_at_us, held, expired, without_room, its_charged_to, more)
  local reply = { 0, its_pending_s, now_us, made_at_us, held, expired, without_room, its_charged_to }
  for i = 1, BUDGETS do reply[8 + i] = spent[i] + more end
  for at = LENGTHS + 1, LENGTHS + 3 * WINDOWS, 3 do
    local window = windows[tonumber(ARGV[at])]
    reply[#reply + 1] = (tonumber(window.oldest) or tonumber(window.bucket)) + window.bucket_s + window.window_s
  end
  return reply
end

if record then
  local state, nanousd, made_at_us, known_digest, its = match(record, '^(%a+) (%d+) (%d+) (%x+) (.*)$')
  if known_digest ~= ARGV[5] then return { 9, 0, now_us } end
  if state ~= 'open' then return { 8, 0, now_us, tonumber(nanousd) } end
  return admitted(tonumber(match(its, '^%d+ (%d+)')), tonumber(made_at_us), tonumber(nanousd), 0, '', its, 0)
end

local known = body and call('GET', KEYS[#KEYS])
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
    local digests, next_digest = match(ARGV[9], '%S*$'), 1 -- What a record says of further budgets.
    for owner, marker_s, shadow, status, start_s, end_s, keep_until_s, cause in
      string.gmatch(ARGV[11], '(%d+),(%d+),(%d),(%d+),(%d+),(%d+),(%d+),(%S+) ') do
      local is_further = status == '13'
      plan[#plan + 1] = { pending = KEYS[PENDING + owner], marker_s = tonumber(marker_s), is_shadow = shadow == '1', status = tonumber(status),
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
  local limits = {}
  for i = 1, BUDGETS do limits[i] = tonumber(ARGV[16 + i]) or math.huge end
  -- An admitted request finds out by its writes whether these are of the wrong kind.
  for i = 1, OWNERS do call('ZCARD', KEYS[PENDING + i]) end
  for number, window in pairs(windows) do
    if window.is_known then spent[number] = read_buckets(window, window.key, over_after(window.bucket_s, window.window_s)).total end
  end

  -- Pending money that was charged to this budget, in buckets that end later than `since_s`, is in the limit. Where a window
  -- is hardly longer than an answer may take, expired money may leave it before it leaves the pending buckets: only what is
  -- surely in both counts.
  local function pending_in(number)
    local window, total = windows[number], 0
    local since_s = window and now_s - window.window_s + pending_bucket_s - 1 or planned(number).start_s
    local flat, over_text, digest = call('ZRANGE', planned(number).pending, 0, -1, 'WITHSCORES'), over_after(pending_bucket_s, pending_s), planned(number).digest
    for i = 1, #flat, 2 do
      local start, is_charged = sub(flat[i], 1, 10), find(flat[i], digest, 12, true) or (digest == THE_SIX and #flat[i] == 10)
      if is_charged and start > over_text and start + pending_bucket_s > since_s then total = total + flat[i + 1] end
    end
    return total
  end

  local function fits_at_s(number)
    local window, live = windows[number], {}
    if not window then return planned(number).end_s > 0 and planned(number).end_s or NEVER_S end
    for i = 1, #window.flat, 2 do
      if window.flat[i] > window.over_text then live[#live + 1] = { start = tonumber(window.flat[i]), held = tonumber(window.flat[i + 1]) } end
    end
    table.sort(live, function(one, other) return one.start < other.start end)
    local left = window.total
    for _, bucket in ipairs(live) do
      left = left - bucket.held
      if left + cost <= limits[number] then return bucket.start + window.bucket_s + window.window_s end
    end
    return now_s + window.bucket_s + window.window_s
  end

  local refusing, busy, ends_at_s, room, never_fits
  local function check_all()
    refusing, busy, ends_at_s, room, never_fits = nil, true, 0, math.huge, false
    for i = 1, BUDGETS do
      if not planned(i).is_shadow then
        room, never_fits = math.min(room, limits[i] - spent[i]), never_fits or cost > limits[i]
        if spent[i] + cost > limits[i] then
          refusing = refusing or i
          busy = busy and spent[i] - pending_in(i) + cost <= limits[i]
          ends_at_s = max(ends_at_s, fits_at_s(i))
        end
      end
    end
  end
  check_all()

  -- `cost` will not fit when pending reservations end, so less may do.
  if refusing and not busy and ARGV[7] ~= '' then
    cost = tonumber(ARGV[7])
    check_all()
    if not refusing then cost, cost_text = room, format('%.0f', room) end
  end

  if refusing then
    local its = planned(refusing)
    -- Nothing that was spent stands in the way of what can never fit: its marker ends by itself.
    local wait_s = (busy or never_fits) and 1 or ends_at_s == NEVER_S and 0 or max(1, ceil(ends_at_s - now_us / SECOND))
    local marker_s = (busy and ARGV[10] ~= '1') and 0 or its.marker_s
    if marker_s > 0 then
      wait_s = wait_s > 0 and max(wait_s, marker_s) or 0
      call('SET', MARKER, format('%s %.0f %.0f %s', its.cause, now_us + marker_s * SECOND, wait_s > 0 and now_us + wait_s * SECOND or 0,
        busy and 'busy' or 'spent'), 'EX', marker_s)
    end
    return { its.status, marker_s, now_us, wait_s, busy and 1 or 0, refusing }
  end
  for i = 1, BUDGETS do
    if spent[i] + cost > limits[i] then without_room = without_room .. i .. ' ' end
  end
end

-- Write: the pending money first. A server that takes no writes refuses here; whichever key refuses, nothing stays changed.

local pending_bucket, expired, is_new, members = format('%.0f', now_s - now_s % pending_bucket_s), 0, {}, {}
local suffix = string.gmatch(ARGV[16], '([^,]*),')
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
      local pending = read_buckets({}, key, over_after(pending_bucket_s, pending_s) .. '~') -- With whatever follows it.
      if pending.over then call('ZREM', key, unpack(pending.over)) end
      if i == EVERYBODY then expired = pending.over_total end
    end
  end
end

call('SET', KEYS[1], format('open %s %.0f %s %s', cost_text, now_us, ARGV[5], ARGV[9]), 'EX', pending_s + RECORD_KEEP_S)
if body then
  call('SET', KEYS[#KEYS], format('open %s %s %s %.0f', body, ARGV[#ARGV], cost_text, now_us + pending_s * SECOND), 'EX', IDEMPOTENCY_KEEP_S)
end

-- A total gets its TTL with its first amount, a window with each new bucket. Where that ends before the bucket does (the
-- window has grown since), it is lengthened to the bucket's own end: a window outlasts its youngest bucket.
for i = 1, BUDGETS do
  if not windows[i] then
    texts[i] = call('INCRBY', KEYS[1 + i], cost_text)
    if spent[i] == 0 and planned(i).keep_until_s > 0 then call('EXPIRE', KEYS[1 + i], planned(i).keep_until_s - now_s) end
  end
end
for at = LENGTHS + 1, LENGTHS + 3 * WINDOWS, 3 do
  local window, witness = windows[tonumber(ARGV[at])], texts[tonumber(ARGV[at + 2])]
  local key, bucket, ttl_s = window.key, window.bucket, window.bucket_s + window.window_s
  local is_first = tonumber(call('ZINCRBY', key, cost_text, bucket)) == cost
  if is_first then call('EXPIRE', key, ttl_s) end
  if not window.is_known then
    local left_ms = (bucket + ttl_s) * 1000 - floor(now_us / 1000)
    if not is_first and call('PTTL', key) < left_ms then call('PEXPIRE', key, format('%.0f', left_ms)) end
    if window.over then call('ZREM', key, unpack(window.over)) end
    if witness then
      call('SET', KEYS[1 + BUDGETS + (at - LENGTHS + 2) / 3], format('%s %s %d %.0f %.0f %s', ARGV[at + 1], bucket,
        window.buckets + (is_first and 1 or 0), witness, window.total + cost, window.oldest < bucket and window.oldest or bucket), 'EX', window.bucket_s)
    end
  end
end

return admitted(pending_s, now_us, cost, expired, without_room, '', cost)
