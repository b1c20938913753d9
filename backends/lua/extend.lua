--[[
extend: may a pending reservation hold more? In the periods in which it was made; every budget is charged, or none is.

KEYS  as in settle.lua

ARGV  1  now_us   2  deadline_us    3  request_digest   as in reserve.lua
      4  to       nanousd to hold in all                5  at_least   nanousd to hold in all, or refuse
      6  made_at_us   as reserve.lua replied            7  counts     8  plan   as in settle.lua
      9  limits   of each budget "<nanousd; none: nothing> "
     10  shares   as in reserve.lua
     11  rid      only with an idempotency key: as in reserve.lua

Reply {status, nanousd held, now_us, ...}
  0  it holds so much now: `to`, or what there is room for, if that is at least `at_least`; then of each budget nanousd
  2 to 7, 13, 14  refused: the number of the first budget that fails, or whose share does (14); nothing changed, no marker
  8  it has ended, is past its time, or is not known: nothing changed
  9  this id stands for something else: nothing changed
 10  too late, the caller has given up: nothing changed

Worked example: it holds 1000, to 1500, at_least 1100, the window has room for 300 more: {0, 1300, …}, every total + 300.

Promise: as reserve.lua's. `to` is the whole, so a question that is asked again charges nothing more.
]]

local SECOND, RECORD_KEEP_S, THE_SIX = 1000000, 3600, '...six' -- As in records.py.
local call, tonumber, floor, ceil = redis.call, tonumber, math.floor, math.ceil
local format, match, find, sub, gmatch, gsub = string.format, string.match, string.find, string.sub, string.gmatch, string.gsub

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local at_least, made_at_us, rid = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[11]
local pending_s, BUDGETS, WINDOWS, OWNERS, EVERYBODY, MINE = match(ARGV[7], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
OWNERS, EVERYBODY = tonumber(OWNERS), tonumber(EVERYBODY)
local PENDING = 1 + BUDGETS + WINDOWS
local made_s, pending_bucket_s = floor(made_at_us / SECOND), ceil(pending_s / 12) -- As in keys.py.
local pending_bucket = format('%.0f', made_s - made_s % pending_bucket_s)

-- As in reserve.lua.
local function left_of_share(own, whole, limit, millionths)
  local rest = limit - math.max(0, whole - own)
  return millionths * floor(rest / 1e6) + floor(millionths * (rest % 1e6) / 1e6) - own
end

-- Read and decide.

if now_us > tonumber(ARGV[2]) then return { 10, 0, now_us } end
local record = call('GET', KEYS[1])
if not record then return { 8, 0, now_us } end
local state, nanousd, request_digest, charged_to = match(record, '^(%a+) (%d+) %d+ (%x%x%x%x%x%x%x%x)%x* (.*)$')
if request_digest ~= ARGV[3] then return { 9, 0, now_us } end

local reset_us = MINE ~= '0' and tonumber(call('GET', KEYS[PENDING + OWNERS + 1]) or nil)
local is_cleared = reset_us and made_at_us <= reset_us
local places, hints, held, ends_us = {}, tonumber(BUDGETS), tonumber(nanousd), made_at_us + pending_s * SECOND
local limits = gmatch(ARGV[9], '(%d*) ')
for owner, window_s, keep_until_s, status in gmatch(ARGV[8], '(%d+),(%d+),(%d+),(%d+) ') do
  -- As large as it gets: a table that grows takes time.
  local place = { limit = tonumber(limits()), status = status, keep_until_s = keep_until_s, is_cleared = is_cleared and owner == MINE,
    bucket = nil, ttl_s = nil, hint = nil, spent = nil }
  if window_s ~= '0' then
    local bucket_s = ceil(window_s / 20) -- As in keys.py.
    hints = hints + 1
    place.bucket, place.ttl_s, place.hint = format('%.0f', made_s - made_s % bucket_s), window_s + bucket_s, hints
    ends_us = math.min(ends_us, (place.bucket + place.ttl_s) * SECOND)
  end
  places[#places + 1] = place
end
-- Past its time it may have been reported as expired; and what has left a window cannot be charged to it.
if state ~= 'open' or ends_us <= now_us then return { 8, held, now_us } end

local known = rid and call('GET', KEYS[#KEYS])
local texts = call('MGET', unpack(KEYS, 2, PENDING))
-- As in reserve.lua: what all buckets but one come to is known by the hint, while that is true, and else all are read. Starts are
-- ten digits, so they compare as text.
local function read_buckets(key, ttl_s)
  local flat, since_text, total = call('ZRANGE', key, 0, -1, 'WITHSCORES'), format('%010.0f', floor(now_us / SECOND - ttl_s) + 1), 0
  for i = 1, #flat, 2 do
    if flat[i] >= since_text then total = total + flat[i + 1] end
  end
  return total
end
local function window_total(key, place)
  local window_s, bucket, buckets, others, oldest = match(texts[place.hint] or '', '^([1-9]%d*) (%d+) (%d+) (%d+) (%d+)$')
  local is_of_it = window_s and window_s + ceil(window_s / 20) == place.ttl_s and oldest + place.ttl_s > now_us / SECOND
  local one = is_of_it and call('ZCARD', key) == tonumber(buckets) and call('ZSCORE', key, bucket)
  return one and others + one or read_buckets(key, place.ttl_s)
end
for i, place in ipairs(places) do
  if place.bucket then
    place.spent = window_total(KEYS[1 + i], place)
  else
    -- As in reserve.lua: MGET takes a key of another kind for a missing one, and an error names the place and not the key.
    local text = texts[i] or call('GET', KEYS[1 + i])
    if text and (not find(text, '^%d+$') or #text > 16) then error('KEYS ' .. 1 + i .. ' holds no amount') end
    place.spent = tonumber(text or 0)
  end
end

local wanted, more, refusing, status = math.max(ARGV[4] - held, 0), nil, nil, nil
local function hold_to(room, number, its_status)
  if room < at_least - held and not refusing then refusing, status = number, its_status end
  more = math.min(more, math.max(room, 0))
end
local function check_all()
  more, refusing = wanted, nil
  -- Shares come before the first budget that is shared.
  local shares, first_shared = {}, nil
  for number, of, millionths in gmatch(ARGV[10], '(%d+),(%d+),(%d+) ') do
    local part, whole = places[tonumber(number)], places[tonumber(of)]
    if not (part.is_cleared or whole.is_cleared) then
      shares[#shares + 1] = { number = tonumber(number), left = left_of_share(part.spent, whole.spent, whole.limit, millionths) }
      first_shared = math.min(first_shared or of, of)
    end
  end
  for i, place in ipairs(places) do
    for _, share in ipairs(i == first_shared and shares or {}) do hold_to(share.left, share.number, 14) end
    hold_to(not place.is_cleared and place.limit and place.limit - place.spent or math.huge, i, place.status)
  end
end
check_all()
if more < wanted then
  -- No hint refuses anything.
  for i, place in ipairs(places) do
    if place.bucket then place.spent = read_buckets(KEYS[1 + i], place.ttl_s) end
  end
  check_all()
end

-- Where an owner's pending money of this reservation is: in the member that names most of what the record does.
local named = { [THE_SIX] = not find(charged_to, ' - -', 1, true) and '' or nil }
for digest in gmatch(match(charged_to, '%S*$'), '......') do named[digest] = '' end
local function own_member(members)
  local own = pending_bucket
  for _, member in ipairs(members) do
    local is_more = #member > #own and sub(member, 1, 10) == pending_bucket
    if is_more and gsub(sub(member, 12), '......', named) == '' then own = member end
  end
  return own
end

local own = {}
-- The six alone have the bucket's start and nothing more: it is only looked at whether the key is of the right kind.
local is_plain = match(charged_to, '^%d+ %d+ %S+ %S+$')
for i = 1, OWNERS do
  local key = KEYS[PENDING + i]
  own[i] = is_plain and call('ZCARD', key) and pending_bucket or own_member(call('ZRANGE', key, 0, -1))
end
if refusing and at_least > held then return { tonumber(status), held, now_us, refusing } end

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

local reply, more_text = { 0, held + more, now_us }, format('%.0f', more)
local function charge_bucket(key, bucket, ttl_s)
  local is_first = tonumber(call('ZINCRBY', key, more_text, bucket)) == more
  if is_first and call('TTL', key) < ttl_s then call('EXPIRE', key, ttl_s) end
  return is_first
end

if more > 0 then
  call('SET', KEYS[1], format('open %.0f %.0f %s %s', held + more, made_at_us, request_digest, charged_to), 'KEEPTTL')
  local body, its_rid, until_us = match(known or '', '^open (%x+) (%S+) %d+ (%d+)$')
  if body and its_rid == rid then call('SET', KEYS[#KEYS], format('open %s %s %.0f %s', body, rid, held + more, until_us), 'KEEPTTL') end
end
for i, place in ipairs(places) do
  local key = KEYS[1 + i]
  -- What was cleared from the identifier's books since is not in them.
  if more > 0 and not place.is_cleared then
    if place.bucket then
      local is_first, hint = charge_bucket(key, place.bucket, place.ttl_s), texts[place.hint]
      -- As in settle.lua.
      if hint and (is_first or match(hint, '^%d+ (%d+) ') ~= place.bucket) then call('DEL', KEYS[1 + place.hint]) end
    else
      call('INCRBY', key, more_text)
      if place.spent == 0 and place.keep_until_s ~= '0' then call('EXPIRE', key, place.keep_until_s - floor(now_us / SECOND)) end
    end
  end
  reply[3 + i] = place.spent + (place.is_cleared and 0 or more)
end
for i = 1, more > 0 and OWNERS or 0 do
  local ttl_s = pending_s + pending_bucket_s + (i == EVERYBODY and RECORD_KEEP_S or 0)
  if not (is_cleared and i == tonumber(MINE)) then charge_bucket(KEYS[PENDING + i], own[i], ttl_s) end
end
return reply
