--[[
settle: a reservation has ended; book what was used in place of what was reserved, into the periods in which it was made.

KEYS  1  llm:reservation:<rid>      2  llm:cost:recent:<id>      3  llm:cost:daily:<id>:<date>
      4  llm:network:recent:<net>   5  llm:network:daily:<net>:<date>
      6  llm:global:hourly:<date>T<hour>                         7  llm:global:daily:<date>
      8  llm:open:identifier:<id>   9  llm:open:network:<net>   10  llm:open:global
      (all of the periods in which the reservation was made; kinds as in reserve.lua)
     11  llm:reset:<id>             string  us: what was reserved up to then is not in the identifier's books any more
     12  llm:idempotency:<digest>   as in reserve.lua; left out where none was sent

ARGV  1  now_us        '' in production: Redis' own TIME; a number in tests
      2  request_digest   digest of what the id stood for at first
      3  end           settled, or released: nothing was used, and the idempotency key is free again
      4  actual        nanousd, >= 0
      5  made_at_us    as reserve.lua replied
      6  window_s      7  bucket_s    8  pending_s       9  pending_bucket_s    (as they were at the reservation)
     10  keep_s        TTL of a record past its end
     11  who          12  network     digests, as in reserve.lua
     13  body         14  rid        15  idempotency_keep_s   (these three with KEYS 12)

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

local SECOND = 1000000
local call, tonumber, floor, format = redis.call, tonumber, math.floor, string.format

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local request_digest, ending = ARGV[2], ARGV[3]
local actual, made_at_us = tonumber(ARGV[4]), tonumber(ARGV[5])
local window_s, bucket_s = tonumber(ARGV[6]), tonumber(ARGV[7])
local pending_s, pending_bucket_s, keep_s = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local now_s, made_s = floor(now_us / SECOND), floor(made_at_us / SECOND)
local DAY_ENDS_S = (floor(made_s / 86400) + 1) * 86400
local HOUR_ENDS_S = (floor(made_s / 3600) + 1) * 3600

-- Read and decide.

local status, delta, held = 0, actual, 0
local record = call('GET', KEYS[1])
if record then
  local state, nanousd, _, known_digest = string.match(record, '^(%a+) (%d+) (%d+) (%x+) ')
  if known_digest ~= request_digest then return { 9, 0, now_us, 0 } end
  if state ~= 'open' then return { 1, tonumber(nanousd), now_us, 0 } end
  held = tonumber(nanousd)
  delta = actual - held
elseif now_us >= made_at_us + keep_s * SECOND then
  return { 3, 0, now_us, 0 }
else
  status = 2
end

local reset_us = tonumber(call('GET', KEYS[11]) or nil)
local is_cleared = reset_us and made_at_us <= reset_us
local known = KEYS[12] and call('GET', KEYS[12])

-- An error names the place and not the key: that holds an identifier, which must not reach a log whole.
local function amount_at(place)
  local text = call('GET', KEYS[place])
  if not text then return nil end
  if not string.find(text, '^%d+$') or #text > 16 then error('KEYS ' .. place .. ' holds no amount') end
  return tonumber(text)
end

local bucket = format('%.0f', made_s - made_s % bucket_s)
local in_window = (tonumber(bucket) + bucket_s + window_s) * SECOND > now_us
local pending_bucket = format('%.0f', made_s - made_s % pending_bucket_s)

-- What was cleared from the identifier's books is not taken from them again.
local totals = {
  { place = 5, keep_until_s = DAY_ENDS_S + 86400 },
  { place = 6, keep_until_s = HOUR_ENDS_S + 7200 },
  { place = 7, keep_until_s = DAY_ENDS_S + 86400 },
}
local windows = { { place = 4 } }
if not is_cleared then
  totals[#totals + 1] = { place = 3, keep_until_s = DAY_ENDS_S + 86400 }
  windows[#windows + 1] = { place = 2 }
end
for _, total in ipairs(totals) do
  total.key, total.held = KEYS[total.place], amount_at(total.place)
end
for _, window in ipairs(windows) do
  window.key = KEYS[window.place]
  window.held = tonumber(call('ZSCORE', window.key, bucket) or nil)
  if window.held and not (window.held >= 0 and window.held < 2 ^ 53) then error('KEYS ' .. window.place .. ' holds no amount') end
end

-- What a killed worker left pending is removed here, so that a key of pending money never grows.
local function open_at(key, is_mine_here)
  local flat, over, mine, expired = call('ZRANGE', key, 0, -1, 'WITHSCORES'), {}, false, 0
  for i = 1, #flat, 2 do
    local start, amount = tonumber(flat[i]), tonumber(flat[i + 1])
    local is_over = not start or (start + pending_bucket_s + pending_s) * SECOND <= now_us
    local own = (is_mine_here and flat[i] == pending_bucket) and held or 0
    if is_over then expired = expired + math.max(amount - own, 0) end
    if is_over or (own > 0 and amount <= own) then
      over[#over + 1] = flat[i]
    elseif own > 0 then
      mine = true
    end
  end
  return { key = key, over = over, mine = mine, expired = expired }
end
local opens = { open_at(KEYS[8], not is_cleared), open_at(KEYS[9], true), open_at(KEYS[10], true) }

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

call('SET', KEYS[1], format('%s %s %.0f %s %s %s %s %s', ending, ARGV[4], made_at_us, request_digest, ARGV[6], ARGV[8], ARGV[11], ARGV[12]),
  'EX', keep_s)

if KEYS[12] then
  local owner = known and string.match(known, '^%a+ %x+ (%S+) ')
  if ending == 'settled' and (not known or owner == ARGV[14]) then
    call('SET', KEYS[12], format('settled %s %s %s %.0f', ARGV[13], ARGV[14], ARGV[4], now_us), 'EX', ARGV[15])
  elseif owner == ARGV[14] then
    call('DEL', KEYS[12])
  end
end

-- 0 - x and not -x: that of nothing is -0, which INCRBY does not take, and by then the record would be written.
local function change(amount)
  return format('%.0f', math.max(delta, 0 - (amount or 0)))
end

for _, total in ipairs(totals) do
  local ttl_s = total.keep_until_s - now_s
  if delta ~= 0 and ttl_s > 0 and (total.held or delta > 0) then
    call('INCRBY', total.key, change(total.held))
    if not total.held then call('EXPIRE', total.key, format('%.0f', ttl_s)) end
  end
end

for _, window in ipairs(windows) do
  if delta ~= 0 and in_window and (window.held or delta > 0) then
    if tonumber(call('ZINCRBY', window.key, change(window.held), bucket)) <= 0 then
      call('ZREM', window.key, bucket)
    elseif not window.held and call('TTL', window.key) < window_s + bucket_s then
      call('EXPIRE', window.key, window_s + bucket_s)
    end
  end
end

for _, open in ipairs(opens) do
  if open.mine then call('ZINCRBY', open.key, format('%.0f', -held), pending_bucket) end
  if #open.over > 0 then call('ZREM', open.key, unpack(open.over)) end
end

return { status, actual, now_us, opens[3].expired }
