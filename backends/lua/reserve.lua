--[[
reserve: may this request spend at most `cost`? Every scope is charged, or none is.

KEYS  1  llm:reservation:<rid>               string  "<state> <nanousd> <made_at_us> <terms>"
      2  llm:throttle:<id>                   string  "<cause> <until_us> <ends_at_s> busy|spent"
      3  llm:cost:recent:<id>                zset    bucket start (unix s) -> nanousd
      4  llm:cost:daily:<id>:<date>          string  nanousd
      5  llm:network:recent:<net>            zset    as 3
      6  llm:network:daily:<net>:<date>      string  nanousd
      7  llm:global:hourly:<date>T<hour>     string  nanousd
      8  llm:global:daily:<date>             string  nanousd
      9  llm:open:identifier:<id>            zset    bucket start (unix s) -> nanousd of open reservations
     10  llm:open:network:<net>              zset    as 9
     11  llm:open:global                     zset    as 9

ARGV  1  now_us           '' in production: Redis' own TIME; a number in tests
      2  deadline_us      Redis' time after which the caller has given up; 0 for none
      3  hour             unix hour that the dated keys were made for
      4  cost             nanousd, > 0
      5  terms            digest of what the id stands for
      6  window_s         length of the window      7  bucket_s    length of a bucket of it
      8  limits, nanousd: window of the identifier  9  its day
     10  window of the network                     11  its day           ('' is no limit, here only)
     12  everybody's hour                          13  everybody's day
     14  throttle_s       life of a marker         15  mark_when_busy    '1' or '0'
     16  open_s           longest life of an open reservation
     17  open_bucket_s    length of a bucket of it 18  keep_s            life of a record past its end

Reply {status, ttl_or_duration, now_us, ...}
  0  admitted:            open_s, now_us, made_at_us, window nanousd, day nanousd (both with this one)
  1  marker still lives:  seconds left of it, now_us, seconds until it can end, busy, status that set it
  2  daily limit, 3 window limit: marker seconds (0: none set), now_us, seconds until it can end, busy, status
  4  network's window, 5 network's day, 6 everybody's hour, 7 everybody's day: the same, no marker ever
  8  this id has ended:   0, now_us, nanousd booked
  9  this id stands for something else: 0, now_us
 10  too late, the caller has given up: 0, now_us
 11  the dated keys are of another hour than Redis': 0, now_us

Worked example: window limit 20000000, three open reservations of 4050000 in it, cost 4050000:
12150000 + 4050000 <= 20000000, so {0, 120, now, now, 16200000, ...}; the fifth gets {3, 30, now, 30, 1, 3}.

Promise: reads and decides first, writes last; whatever can be of the wrong kind has been read before the first write, and
the first write is one that a full or read-only server refuses. No decision rests on a TTL: those only collect what is over.
A bucket counts until its youngest possible nano-dollar has left the window (n + 1 buckets), so a true window never exceeds
the limit. All numbers stay below 2^53; amounts reach Redis as the strings that came in.
]]

local CAUSES = { [2] = 'daily_limit', [3] = 'window_limit' }
local STATUS_OF = { daily_limit = 2, window_limit = 3 }
local SECOND = 1000000

local function redis_time_us()
  local time = redis.call('TIME')
  return time[1] * SECOND + time[2]
end

local function amount_at(key)
  local text = redis.call('GET', key)
  if not text then return 0 end
  if not string.find(text, '^%d+$') then error(key .. ' holds no amount') end
  return tonumber(text)
end

-- {total, buckets, expired members}: a bucket is over when now has reached its start + its length + `life_s`.
local function ring_at(key, bucket_s, life_s, now_us)
  local ring = { total = 0, starts = {}, amounts = {}, over = {} }
  local flat = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #flat, 2 do
    local start = tonumber(flat[i])
    if not start then error(key .. ' holds no ring') end
    if (start + bucket_s + life_s) * SECOND > now_us then
      local amount = tonumber(flat[i + 1])
      ring.total = ring.total + amount
      ring.starts[#ring.starts + 1] = start
      ring.amounts[start] = amount
    else
      ring.over[#ring.over + 1] = flat[i]
    end
  end
  return ring
end

local now_us = ARGV[1] ~= '' and tonumber(ARGV[1]) or redis_time_us()
local cost = tonumber(ARGV[4])
local terms = ARGV[5]
local window_s, bucket_s = tonumber(ARGV[6]), tonumber(ARGV[7])
local throttle_s, open_s, open_bucket_s = tonumber(ARGV[14]), tonumber(ARGV[16]), tonumber(ARGV[17])
local now_s = math.floor(now_us / SECOND)
local hour = math.floor(now_s / 3600)
local day = math.floor(now_s / 86400)

-- Read and decide: the caller, the period, the id, the marker.

if ARGV[2] ~= '0' and now_us > tonumber(ARGV[2]) then return { 10, 0, now_us } end
if hour ~= tonumber(ARGV[3]) then return { 11, 0, now_us } end

local record = redis.call('GET', KEYS[1])
if record then
  local state, nanousd, made_at_us, known_terms = string.match(record, '^(%a+) (%d+) (%d+) (%x+)$')
  if known_terms ~= terms then return { 9, 0, now_us } end
  if state ~= 'open' then return { 8, 0, now_us, tonumber(nanousd) } end
  local ring = ring_at(KEYS[3], bucket_s, window_s, now_us)
  return { 0, open_s, now_us, tonumber(made_at_us), ring.total, amount_at(KEYS[4]) }
end

local marker = redis.call('GET', KEYS[2])
if marker then
  local cause, until_us, ends_at_s, busy = string.match(marker, '^([%a_]+) (%d+) (%d+) (%a+)$')
  if not cause then
    -- Set by hand: it throttles for as long as it lives.
    local left_ms = redis.call('PTTL', KEYS[2])
    local left_s = left_ms >= 0 and math.ceil(left_ms / 1000) or throttle_s
    return { 1, left_s, now_us, left_s, 0, 3 }
  end
  local left_s = math.ceil((until_us - now_us) / SECOND)
  if left_s > 0 then
    return { 1, left_s, now_us, math.max(left_s, ends_at_s - now_s), busy == 'busy' and 1 or 0, STATUS_OF[cause] or 3 }
  end
end

-- Read the books.

local recent = ring_at(KEYS[3], bucket_s, window_s, now_us)
local daily = amount_at(KEYS[4])
local network_recent = ring_at(KEYS[5], bucket_s, window_s, now_us)
local network_daily = amount_at(KEYS[6])
local hourly_of_all = amount_at(KEYS[7])
local daily_of_all = amount_at(KEYS[8])
for i = 9, 11 do redis.call('ZCARD', KEYS[i]) end

-- Decide: the limits in the order in which they are told; all that fail are looked at, since the latest end counts.

local DAY_ENDS_S, HOUR_ENDS_S = (day + 1) * 86400, (hour + 1) * 3600

local function open_since(key, since_s)
  local ring = ring_at(key, open_bucket_s, open_s, now_us)
  local total = 0
  for _, start in ipairs(ring.starts) do
    if start + open_bucket_s > since_s then total = total + ring.amounts[start] end
  end
  return total
end

local function ring_fits_at_s(ring, limit)
  table.sort(ring.starts)
  local left = ring.total
  for _, start in ipairs(ring.starts) do
    left = left - ring.amounts[start]
    if left + cost <= limit then return start + bucket_s + window_s end
  end
  return now_s + window_s + bucket_s
end

local limits = {
  { status = 2, spent = daily, limit = ARGV[9], open = KEYS[9], since_s = day * 86400, ends_at_s = DAY_ENDS_S },
  { status = 3, spent = recent.total, limit = ARGV[8], open = KEYS[9], since_s = 0, ring = recent },
  { status = 4, spent = network_recent.total, limit = ARGV[10], open = KEYS[10], since_s = 0, ring = network_recent },
  { status = 5, spent = network_daily, limit = ARGV[11], open = KEYS[10], since_s = day * 86400, ends_at_s = DAY_ENDS_S },
  { status = 6, spent = hourly_of_all, limit = ARGV[12], open = KEYS[11], since_s = hour * 3600, ends_at_s = HOUR_ENDS_S },
  { status = 7, spent = daily_of_all, limit = ARGV[13], open = KEYS[11], since_s = day * 86400, ends_at_s = DAY_ENDS_S },
}

local status, busy, ends_at_s = 0, true, 0
for _, each in ipairs(limits) do
  local limit = tonumber(each.limit)
  if limit and each.spent + cost > limit then
    if status == 0 then status = each.status end
    busy = busy and each.spent - open_since(each.open, each.since_s) + cost <= limit
    ends_at_s = math.max(ends_at_s, each.ends_at_s or ring_fits_at_s(each.ring, limit))
  end
end

if status ~= 0 then
  local wait_s = busy and 1 or math.max(1, math.ceil(ends_at_s - now_us / SECOND))
  if status > 3 then return { status, wait_s, now_us, wait_s, busy and 1 or 0, status } end
  if busy and ARGV[15] ~= '1' then return { status, 0, now_us, wait_s, 1, status } end
  local marker_s = status == 2 and 2 * throttle_s or throttle_s
  wait_s = math.max(wait_s, marker_s)
  redis.call('SET', KEYS[2], string.format('%s %.0f %.0f %s', CAUSES[status], now_us + marker_s * SECOND,
    math.ceil(now_us / SECOND) + wait_s, busy and 'busy' or 'spent'), 'EX', marker_s)
  return { status, marker_s, now_us, wait_s, busy and 1 or 0, status }
end

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

local function charge_ring(key, start, life_s)
  redis.call('ZINCRBY', key, ARGV[4], string.format('%.0f', start))
  redis.call('EXPIRE', key, life_s)
end

local function charge_total(key, ends_at_second)
  redis.call('INCRBY', key, ARGV[4])
  redis.call('EXPIRE', key, string.format('%.0f', ends_at_second - now_s))
end

redis.call('SET', KEYS[1], string.format('open %s %.0f %s', ARGV[4], now_us, terms), 'EX', open_s + tonumber(ARGV[18]))
local bucket = now_s - now_s % bucket_s
charge_ring(KEYS[3], bucket, window_s + bucket_s)
charge_total(KEYS[4], DAY_ENDS_S + 86400)
charge_ring(KEYS[5], bucket, window_s + bucket_s)
charge_total(KEYS[6], DAY_ENDS_S + 86400)
charge_total(KEYS[7], HOUR_ENDS_S + 7200)
charge_total(KEYS[8], DAY_ENDS_S + 86400)
local open_bucket = now_s - now_s % open_bucket_s
for i = 9, 11 do charge_ring(KEYS[i], open_bucket, open_s + open_bucket_s) end
if #recent.over > 0 then redis.call('ZREM', KEYS[3], unpack(recent.over)) end
if #network_recent.over > 0 then redis.call('ZREM', KEYS[5], unpack(network_recent.over)) end

return { 0, open_s, now_us, now_us, recent.total + cost, daily + cost }
