--[[
settle: a reservation has ended; book what was used in place of what was reserved, into the periods in which it was made.

KEYS  record, per budget, per window, per owner: as in reserve.lua, of the periods in which the reservation was made
      reset         llm:reset:<identifier>  string  us: what was reserved up to then is not in the identifier's books any more;
                    unless ARGV 8 is 0
      idempotency   as in reserve.lua; only with `body`

ARGV  1  now_us   2  request_digest   as in reserve.lua
      3  end      settled, or released: nothing was used, and the idempotency key is free again
      4  actual   nanousd, >= 0       5  made_at_us   6  pending_s   7  charged_to   as reserve.lua replied
      8  mine     the number of the owner who is the identifier, or 0      9  everybody   as in reserve.lua
     10  plan     of each budget "<its owner's number>,<keep_until_s> "
     11  budgets  12  windows         13  owners   how many there are
     then per window; then body and rid, only with an idempotency key: as in reserve.lua

Reply {status, booked nanousd, now_us, expired nanousd}
  0  settled or released: now at `actual`
  1  repeated: it had ended before, nothing changed; booked is what the first end booked
  2  late: its record was lost before its time, and its booking with it (one script wrote both): booked now, once
  3  expired: no record, and so old that the record of an end may be over; it stays booked in full, nothing changed
  9  this id stands for something else: nothing changed
`expired` is what other reservations held that have expired: it was removed from the pending buckets, and stays booked.

Worked example: 4050000 reserved, 1012500 used: every total and bucket that holds the 4050000 goes down by 3037500.

Promise: at most one end for an id; no total goes below zero; a total that has aged out is not made again by taking from it.
What is taken back is what the record holds, so an extension whose reply was lost is taken back too.
]]

local SECOND, RECORD_KEEP_S, IDEMPOTENCY_KEEP_S, THE_SIX = 1000000, 3600, 86400, '...six' -- As in records.py.
local call, tonumber, floor, ceil, max = redis.call, tonumber, math.floor, math.ceil, math.max
local format, match, find, sub = string.format, string.match, string.find, string.sub

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local made_at_us, pending_s, MINE, EVERYBODY = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[8]), tonumber(ARGV[9])
local BUDGETS, WINDOWS, OWNERS = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local PENDING, body = 1 + BUDGETS + WINDOWS, ARGV[14 + 3 * WINDOWS]
local made_s, pending_bucket_s = floor(made_at_us / SECOND), ceil(pending_s / 12) -- As in keys.py.
local pending_bucket = format('%.0f', made_s - made_s % pending_bucket_s)

-- Read and decide.

local status, delta, held, charged_to = 0, tonumber(ARGV[4]), 0, ''
local record = call('GET', KEYS[1])
if record then
  local state, nanousd, known_digest, its = match(record, '^(%a+) (%d+) %d+ (%x+) (.*)$')
  if known_digest ~= ARGV[2] then return { 9, 0, now_us, 0 } end
  if state ~= 'open' then return { 1, tonumber(nanousd), now_us, 0 } end
  held, charged_to = tonumber(nanousd), its
  delta = delta - held
elseif now_us >= made_at_us + RECORD_KEEP_S * SECOND then
  return { 3, 0, now_us, 0 }
else
  status = 2
end

local reset_us = MINE > 0 and tonumber(call('GET', KEYS[PENDING + OWNERS + 1]) or nil)
local is_cleared = reset_us and made_at_us <= reset_us
local known = body and call('GET', KEYS[#KEYS])

local texts, places, is_even = BUDGETS > 0 and call('MGET', unpack(KEYS, 2, 1 + BUDGETS)) or {}, {}, true
for owner, keep_until_s in string.gmatch(ARGV[10], '(%d+),(%d+) ') do
  places[#places + 1] = { is_cleared = is_cleared and tonumber(owner) == MINE, keep_until_s = tonumber(keep_until_s), change = 0 }
end
for at = 14, 13 + 3 * WINDOWS, 3 do
  local window_s, place = tonumber(ARGV[at + 1]), places[tonumber(ARGV[at])]
  local bucket_s = ceil(window_s / 20) -- As in keys.py.
  place.bucket, place.keep_until_s = format('%.0f', made_s - made_s % bucket_s), made_s - made_s % bucket_s + bucket_s + window_s
  place.ttl_s = bucket_s + window_s
end
for i, place in ipairs(places) do
  -- As in reserve.lua: MGET takes a key of another kind for a missing one, and an error names the place and not the key.
  local text = place.bucket and call('ZSCORE', KEYS[1 + i], place.bucket) or not place.bucket and (texts[i] or call('GET', KEYS[1 + i]))
  if text and (not find(text, '^%d+$') or #text > 16) then error('KEYS ' .. 1 + i .. ' holds no amount') end
  place.held = tonumber(text or nil)
  local is_over = place.keep_until_s > 0 and place.keep_until_s * SECOND <= now_us
  -- What was cleared from the identifier's books is not taken from them again. 0 - x and not -x: that of nothing is -0.
  if not is_over and not place.is_cleared and (place.held or delta > 0) then place.change = max(delta, 0 - (place.held or 0)) end
  is_even = is_even and (place.is_cleared or place.change == delta)
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

-- What a killed worker left pending is removed here, so that a key of pending money never grows.
local pendings = {}
for i = 1, OWNERS do
  local its = { key = KEYS[PENDING + i], over = {}, expired = 0 }
  local flat = call('ZRANGE', its.key, 0, -1, 'WITHSCORES')
  its.own = held > 0 and not (is_cleared and i == MINE) and own_member(flat)
  for j = 1, #flat, 2 do
    local start, amount = tonumber(sub(flat[j], 1, 10)), tonumber(flat[j + 1])
    local is_over = not start or (start + pending_bucket_s + pending_s) * SECOND <= now_us
    local own = flat[j] == its.own and held or 0
    if is_over then its.expired = its.expired + max(amount - own, 0) end
    if is_over or (own > 0 and amount <= own) then its.over[#its.over + 1] = flat[j] elseif own > 0 then its.is_mine_there = true end
  end
  pendings[i] = its
end

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

call('SET', KEYS[1], format('%s %s %.0f %s %s', ARGV[3], ARGV[4], made_at_us, ARGV[2], ARGV[7]), 'EX', RECORD_KEEP_S)
if body then
  local rid = known and match(known, '^%a+ %x+ (%S+) ')
  if ARGV[3] == 'settled' and (not known or rid == ARGV[#ARGV]) then
    call('SET', KEYS[#KEYS], format('settled %s %s %s %.0f', body, ARGV[#ARGV], ARGV[4], now_us), 'EX', IDEMPOTENCY_KEEP_S)
  elseif rid == ARGV[#ARGV] then
    call('DEL', KEYS[#KEYS])
  end
end

for i, place in ipairs(places) do
  local key, change = KEYS[1 + i], format('%.0f', place.change)
  if place.change == 0 then
    -- Nothing is booked here.
  elseif not place.bucket then
    call('INCRBY', key, change)
    if not place.held and place.keep_until_s > 0 then call('EXPIRE', key, format('%.0f', place.keep_until_s - floor(now_us / SECOND))) end
  elseif tonumber(call('ZINCRBY', key, change, place.bucket)) <= 0 then
    call('ZREM', key, place.bucket)
  elseif not place.held and call('TTL', key) < place.ttl_s then
    call('EXPIRE', key, place.ttl_s)
  end
end
-- What is known of windows holds while all that is booked for their owners changes alike.
if WINDOWS > 0 and not is_even then call('DEL', unpack(KEYS, 2 + BUDGETS, PENDING)) end
for _, its in ipairs(pendings) do
  if its.is_mine_there then call('ZINCRBY', its.key, format('%.0f', -held), its.own) end
  if #its.over > 0 then call('ZREM', its.key, unpack(its.over)) end
end

return { status, tonumber(ARGV[4]), now_us, pendings[EVERYBODY] and pendings[EVERYBODY].expired or 0 }
