--[[
settle: a reservation has ended; book what was used in place of what was reserved, into the periods in which it was made.

KEYS  record, per budget, per window, per owner: as in reserve.lua, of the periods in which the reservation was made
      reset         llm:reset:<identifier>  string  us: what was reserved up to then is not in the identifier's books any more;
                    unless <mine> is 0
      idempotency   as in reserve.lua; only with `body`

ARGV  1  now_us   2  request_digest   as in reserve.lua
      3  end      paid, or released: nothing was used, and the idempotency key is free again
      4  actual   nanousd, >= 0       5  made_at_us   6  charged_to   as reserve.lua replied
      7  counts   "<pending_s> <budgets> <windows> <owners> <everybody> <mine>": as in reserve.lua, and the number of the owner
                  who is the identifier, or 0
      8  plan     of each budget "<its owner's number>,<window_s, 0: a total>,<keep_until_s>,<status> "
      9  body    10  rid   as in reserve.lua; only with an idempotency key

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
local format, match, find, sub, gmatch, gsub = string.format, string.match, string.find, string.sub, string.gmatch, string.gsub

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local made_at_us, body = tonumber(ARGV[5]), ARGV[9]
local pending_s, BUDGETS, WINDOWS, OWNERS, EVERYBODY, MINE = match(ARGV[7], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
OWNERS, EVERYBODY, MINE = tonumber(OWNERS), tonumber(EVERYBODY), tonumber(MINE)
local PENDING = 1 + BUDGETS + WINDOWS
local made_s, pending_bucket_s = floor(made_at_us / SECOND), ceil(pending_s / 12) -- As in keys.py.
local pending_bucket = format('%.0f', made_s - made_s % pending_bucket_s)

-- Read and decide.

local status, delta, held, charged_to = 0, tonumber(ARGV[4]), 0, ''
local record = call('GET', KEYS[1])
if record then
  local state, nanousd, known_digest, its = match(record, '^(%a+) (%d+) %d+ (%x%x%x%x%x%x%x%x)%x* (.*)$')
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

local texts, places, hints = call('MGET', unpack(KEYS, 2, PENDING)), {}, tonumber(BUDGETS)
for owner, window_s, keep_until_s in gmatch(ARGV[8], '(%d+),(%d+),(%d+),%d+ ') do
  local i, ends_s, bucket, ttl_s, hint, text = #places + 1, tonumber(keep_until_s), nil, nil, nil, nil
  if window_s ~= '0' then
    local bucket_s = ceil(window_s / 20) -- As in keys.py.
    hints = hints + 1
    bucket, ttl_s, hint = format('%.0f', made_s - made_s % bucket_s), bucket_s + window_s, hints
    ends_s, text = bucket + ttl_s, call('ZSCORE', KEYS[1 + i], bucket)
  else
    -- As in reserve.lua: MGET takes a key of another kind for a missing one, and an error names the place and not the key.
    text = texts[i] or call('GET', KEYS[1 + i])
  end
  if text and (not find(text, '^%d+$') or #text > 16) then error('KEYS ' .. 1 + i .. ' holds no amount') end
  -- What has aged out is over, and what was cleared from the identifier's books is not taken from them again.
  local there, is_over = tonumber(text or nil), ends_s > 0 and ends_s * SECOND <= now_us
  local change = (is_over or is_cleared and tonumber(owner) == MINE) and 0 or max(delta, -(there or 0))
  places[i] = { change = change, held = there, bucket = bucket, ttl_s = ttl_s, ends_s = ends_s, hint = hint }
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

-- What a killed worker left pending is removed here, so that a key of pending money never grows. Amounts are read where they
-- matter: all of them take twice the time of the members.
local pendings, now_s = {}, floor(now_us / SECOND)
local since_text, next_text = format('%010.0f', now_s + 1 - pending_bucket_s - pending_s), format('%010.0f', now_s + 1) -- As in reserve.lua.
for i = 1, OWNERS do
  local key, over, expired, rest = KEYS[PENDING + i], {}, 0, nil
  local members = call('ZRANGE', key, 0, -1)
  local own = not (is_cleared and i == MINE) and own_member(members)
  for _, member in ipairs(members) do
    local is_over = member < since_text or (member > next_text and not find(member, '^%d%d%d%d%d%d%d%d%d%d'))
    if is_over or member == own then
      local others = call('ZSCORE', key, member) - (member == own and held or 0)
      if is_over then expired = expired + max(others, 0) end
      if is_over or others <= 0 then over[#over + 1] = member else rest = own end
    end
  end
  pendings[i] = { key = key, over = over, expired = expired, rest = rest }
end

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

call('SET', KEYS[1], format('%s %s %.0f %s %s', ARGV[3], ARGV[4], made_at_us, ARGV[2], ARGV[6]), 'EX', RECORD_KEEP_S)
if body then
  local rid = known and match(known, '^%a+ %x+ (%S+) ')
  if ARGV[3] == 'paid' and (not known or rid == ARGV[10]) then
    call('SET', KEYS[#KEYS], format('settled %s %s %s %.0f', body, ARGV[10], ARGV[4], now_us), 'EX', IDEMPOTENCY_KEEP_S)
  elseif rid == ARGV[10] then
    call('DEL', KEYS[#KEYS])
  end
end

for i, place in ipairs(places) do
  local key, change = KEYS[1 + i], format('%.0f', place.change)
  if place.change == 0 then
    -- Nothing is booked here.
  elseif not place.bucket then
    call('INCRBY', key, change)
    if not place.held and place.ends_s > 0 then call('EXPIRE', key, format('%.0f', place.ends_s - now_s)) end
  else
    if tonumber(call('ZINCRBY', key, change, place.bucket)) <= 0 then
      call('ZREM', key, place.bucket)
    elseif not place.held and call('TTL', key) < place.ttl_s then
      call('EXPIRE', key, place.ttl_s)
    end
    -- A hint holds while no other bucket than its own has changed.
    local hint = texts[place.hint]
    if hint and not (place.held and match(hint, '^%d+ (%d+) ') == place.bucket) then call('DEL', KEYS[1 + place.hint]) end
  end
end
for _, its in ipairs(pendings) do
  if its.rest then call('ZINCRBY', its.key, format('%.0f', -held), its.rest) end
  if #its.over > 0 then call('ZREM', its.key, unpack(its.over)) end
end

return { status, tonumber(ARGV[4]), now_us, pendings[EVERYBODY] and pendings[EVERYBODY].expired or 0 }
