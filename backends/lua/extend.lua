--[[
extend: may a pending reservation hold more? In the periods in which it was made; every budget is charged, or none is.

KEYS  as in settle.lua

ARGV  1  now_us   2  deadline_us    3  request_digest   as in reserve.lua
      4  to       nanousd to hold in all                5  at_least   nanousd to hold in all, or refuse
      6  made_at_us                 7  pending_s        as reserve.lua replied
      8  mine     9  everybody     11  budgets    12  windows    13  owners   as in settle.lua
     10  plan     of each budget "<its owner's number>,<keep_until_s>,<status> "
     then per budget its limit, per window, and rid, only with an idempotency key: as in reserve.lua

Reply {status, nanousd held, now_us, ...}
  0  it holds so much now: `to`, or what there is room for, if that is at least `at_least`; then of each budget nanousd
  2 to 7, 13  refused: the number of the first budget that fails; nothing changed, no marker
  8  it has ended, is past its time, or is not known: nothing changed
  9  this id stands for something else: nothing changed
 10  too late, the caller has given up: nothing changed

Worked example: it holds 1000, to 1500, at_least 1100, the window has room for 300 more: {0, 1300, …}, every total + 300.

Promise: as reserve.lua's. `to` is the whole, so a question that is asked again charges nothing more.
]]

local SECOND, RECORD_KEEP_S, THE_SIX = 1000000, 3600, '...six' -- As in records.py.
local call, tonumber, floor, ceil = redis.call, tonumber, math.floor, math.ceil
local format, match, find = string.format, string.match, string.find

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local at_least, made_at_us, pending_s = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local MINE, EVERYBODY, BUDGETS = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[11])
local WINDOWS, OWNERS = tonumber(ARGV[12]), tonumber(ARGV[13])
local PENDING, rid = 1 + BUDGETS + WINDOWS, ARGV[14 + BUDGETS + 3 * WINDOWS]
local made_s, pending_bucket_s = floor(made_at_us / SECOND), ceil(pending_s / 12) -- As in keys.py.
local pending_bucket = format('%.0f', made_s - made_s % pending_bucket_s)

-- Read and decide.

if now_us > tonumber(ARGV[2]) then return { 10, 0, now_us } end
local record = call('GET', KEYS[1])
if not record then return { 8, 0, now_us } end
local state, nanousd, request_digest, charged_to = match(record, '^(%a+) (%d+) %d+ (%x+) (.*)$')
if request_digest ~= ARGV[3] then return { 9, 0, now_us } end

local places, held, ends_us = {}, tonumber(nanousd), made_at_us + pending_s * SECOND
for owner, keep_until_s, status in string.gmatch(ARGV[10], '(%d+),(%d+),(%d+) ') do
  places[#places + 1] = { owner = tonumber(owner), keep_until_s = tonumber(keep_until_s), status = tonumber(status) }
end
for at = 14 + BUDGETS, 13 + BUDGETS + 3 * WINDOWS, 3 do
  local window_s, place = tonumber(ARGV[at + 1]), places[tonumber(ARGV[at])]
  local bucket_s = ceil(window_s / 20) -- As in keys.py.
  place.bucket, place.ttl_s = format('%.0f', made_s - made_s % bucket_s), window_s + bucket_s
  ends_us = math.min(ends_us, (place.bucket + place.ttl_s) * SECOND)
end
-- Past its time it may have been reported as expired; and what has left a window cannot be charged to it.
if state ~= 'open' or ends_us <= now_us then return { 8, held, now_us } end

local reset_us = MINE > 0 and tonumber(call('GET', KEYS[PENDING + OWNERS + 1]) or nil)
local is_cleared = reset_us and made_at_us <= reset_us
local known = rid and call('GET', KEYS[#KEYS])

local more, refusing = math.max(ARGV[4] - held, 0), nil
for i, place in ipairs(places) do
  place.spent, place.is_cleared = 0, is_cleared and place.owner == MINE
  if place.bucket then
    -- As in reserve.lua: starts are ten digits, so they compare as text.
    local flat, over_text = call('ZRANGE', KEYS[1 + i], 0, -1, 'WITHSCORES'), format('%010.0f', floor(now_us / SECOND - place.ttl_s))
    for j = 1, #flat, 2 do
      if flat[j] > over_text then place.spent = place.spent + flat[j + 1] end
    end
  else
    local text = call('GET', KEYS[1 + i])
    -- An error names the place and not the key: that holds an identifier, which must not reach a log whole.
    if text and (not find(text, '^%d+$') or #text > 16) then error('KEYS ' .. 1 + i .. ' holds no amount') end
    place.spent = tonumber(text or 0)
  end
  local room = not place.is_cleared and tonumber(ARGV[13 + i]) and ARGV[13 + i] - place.spent or math.huge
  if room < at_least - held and not refusing then refusing = i end
  more = math.min(more, math.max(room, 0))
end
-- Where an owner's pending money of this reservation is: in the member that names most of what the record does.
local function own_member(flat)
  local own, named = pending_bucket, nil
  for i = 1, #flat, 2 do
    local start, digests = match(flat[i], '^(%d+):(.*)$')
    if start == pending_bucket and #flat[i] > #own then
      if not named then
        local who, further = match(charged_to, '^%d+ %d+ (%S+) %S+ ?(.*)$')
        named = further .. (who ~= '-' and THE_SIX or '')
      end
      local is_ours = true
      for digest in string.gmatch(digests, '......') do is_ours = is_ours and find(named, digest, 1, true) end
      if is_ours then own = flat[i] end
    end
  end
  return own
end

local own = {}
for i = 1, OWNERS do own[i] = own_member(call('ZRANGE', KEYS[PENDING + i], 0, -1, 'WITHSCORES')) end
if refusing and at_least > held then return { places[refusing].status, held, now_us, refusing } end

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

local function charge_bucket(key, more_text, bucket, ttl_s)
  if tonumber(call('ZINCRBY', key, more_text, bucket)) == more and call('TTL', key) < ttl_s then call('EXPIRE', key, ttl_s) end
end

local reply, more_text = { 0, held + more, now_us }, format('%.0f', more)
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
      charge_bucket(key, more_text, place.bucket, place.ttl_s)
    else
      call('INCRBY', key, more_text)
      if place.spent == 0 and place.keep_until_s > 0 then call('EXPIRE', key, place.keep_until_s - floor(now_us / SECOND)) end
    end
  end
  reply[3 + i] = place.spent + (place.is_cleared and 0 or more)
end
for i = 1, more > 0 and OWNERS or 0 do
  local ttl_s = pending_s + pending_bucket_s + (i == EVERYBODY and RECORD_KEEP_S or 0)
  if not (is_cleared and i == MINE) then charge_bucket(KEYS[PENDING + i], more_text, own[i], ttl_s) end
end
return reply
