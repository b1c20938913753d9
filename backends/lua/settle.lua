--[[
settle: a reservation has ended; book what was used in place of what was reserved, into the periods in which it was made.

KEYS  1  llm:reservation:<rid>      2  llm:cost:recent:<id>      3  llm:cost:daily:<id>:<date>
      4  llm:network:recent:<net>   5  llm:network:daily:<net>:<date>
      6  llm:global:hourly:<date>T<hour>                         7  llm:global:daily:<date>
      8  llm:open:identifier:<id>   9  llm:open:network:<net>   10  llm:open:global
      (all of the periods in which the reservation was made; kinds as in reserve.lua)

ARGV  1  now_us        '' in production: Redis' own TIME; a number in tests
      2  terms         digest of what the id stands for
      3  reserved      nanousd        4  actual       nanousd, >= 0
      5  made_at_us    as reserve.lua told it
      6  window_s      7  bucket_s    8  open_s       9  open_bucket_s    (as they were at the reservation)
     10  keep_s        life of a record past its end

Reply {status, booked nanousd, now_us}
  0  settled: now at `actual`
  1  repeated: it had ended before, nothing changed; booked is what the first end booked
  2  late: its record was lost before its time, and its booking with it (one script wrote both): booked now, once
  3  expired: no record, and so old that the record of an end may be over; it stays booked in full, nothing changed
  9  this id stands for something else: nothing changed

Promise: at most one end for an id; no total goes below zero; a total that has aged out is not made again by taking from it.
]]

local SECOND = 1000000

local function redis_time_us()
  local time = redis.call('TIME')
  return time[1] * SECOND + time[2]
end

local now_us = ARGV[1] ~= '' and tonumber(ARGV[1]) or redis_time_us()
local terms = ARGV[2]
local reserved, actual, made_at_us = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local window_s, bucket_s = tonumber(ARGV[6]), tonumber(ARGV[7])
local open_s, open_bucket_s, keep_s = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local now_s, made_s = math.floor(now_us / SECOND), math.floor(made_at_us / SECOND)
local DAY_ENDS_S = (math.floor(made_s / 86400) + 1) * 86400
local HOUR_ENDS_S = (math.floor(made_s / 3600) + 1) * 3600

-- Read and decide.

local status, delta = 0, actual - reserved
local record = redis.call('GET', KEYS[1])
if record then
  local state, nanousd, _, known_terms = string.match(record, '^(%a+) (%d+) (%d+) (%x+)$')
  if known_terms ~= terms then return { 9, 0, now_us } end
  if state ~= 'open' then return { 1, tonumber(nanousd), now_us } end
elseif now_us >= made_at_us + keep_s * SECOND then
  return { 3, reserved, now_us }
else
  status, delta = 2, actual
end

local function amount_at(key)
  local text = redis.call('GET', key)
  if not text then return nil end
  if not string.find(text, '^%d+$') or #text > 16 then error(key .. ' holds no amount') end
  return tonumber(text)
end

local bucket = string.format('%.0f', made_s - made_s % bucket_s)
local in_window = (tonumber(bucket) + bucket_s + window_s) * SECOND > now_us
local open_bucket = string.format('%.0f', made_s - made_s % open_bucket_s)

local totals = {
  { key = KEYS[3], keep_until_s = DAY_ENDS_S + 86400 },
  { key = KEYS[5], keep_until_s = DAY_ENDS_S + 86400 },
  { key = KEYS[6], keep_until_s = HOUR_ENDS_S + 7200 },
  { key = KEYS[7], keep_until_s = DAY_ENDS_S + 86400 },
}
for _, total in ipairs(totals) do total.held = amount_at(total.key) end
local rings = { { key = KEYS[2] }, { key = KEYS[4] } }
for _, ring in ipairs(rings) do
  ring.held = tonumber(redis.call('ZSCORE', ring.key, bucket) or nil)
  if ring.held and not (ring.held >= 0 and ring.held < 2 ^ 53) then error(ring.key .. ' holds no amount') end
end

-- What a killed worker left open is swept here, on the way, so that a ring of open money never grows.
local function open_at(key)
  local flat, over, mine = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES'), {}, false
  for i = 1, #flat, 2 do
    local start = tonumber(flat[i])
    local is_over = not start or (start + open_bucket_s + open_s) * SECOND <= now_us
    local is_mine = flat[i] == open_bucket and status == 0
    if is_over or (is_mine and tonumber(flat[i + 1]) <= reserved) then
      over[#over + 1] = flat[i]
    elseif is_mine then
      mine = true
    end
  end
  return { key = key, over = over, mine = mine }
end
local opens = { open_at(KEYS[8]), open_at(KEYS[9]), open_at(KEYS[10]) }

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

redis.call('SET', KEYS[1], string.format('settled %s %.0f %s', ARGV[4], made_at_us, terms), 'EX', keep_s)

local function change(held)
  return string.format('%.0f', math.max(delta, -(held or 0)))
end

for _, total in ipairs(totals) do
  local life_s = total.keep_until_s - now_s
  if delta ~= 0 and life_s > 0 and (total.held or delta > 0) then
    redis.call('INCRBY', total.key, change(total.held))
    if not total.held then redis.call('EXPIRE', total.key, string.format('%.0f', life_s)) end
  end
end

for _, ring in ipairs(rings) do
  if delta ~= 0 and in_window and (ring.held or delta > 0) then
    if tonumber(redis.call('ZINCRBY', ring.key, change(ring.held), bucket)) <= 0 then
      redis.call('ZREM', ring.key, bucket)
    elseif not ring.held then
      redis.call('EXPIRE', ring.key, window_s + bucket_s)
    end
  end
end

for _, open in ipairs(opens) do
  if open.mine then redis.call('ZINCRBY', open.key, '-' .. ARGV[3], open_bucket) end
  if #open.over > 0 then redis.call('ZREM', open.key, unpack(open.over)) end
end

return { status, actual, now_us }
