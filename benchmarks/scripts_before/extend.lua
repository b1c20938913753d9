--[[
extend: may a pending reservation hold more? In the periods in which it was made; every scope is charged, or none is.

KEYS  1 to 12 as in settle.lua

ARGV  1  now_us           '' in production: Redis' own TIME; a number in tests
      2  deadline_us      Redis' time after which the caller has given up
      3  request_digest   digest of what the id stood for at first
      4  to               nanousd to hold in all           5  at_least        nanousd to hold in all, or refuse
      6  made_at_us       as reserve.lua replied
      7  window_s         8  bucket_s    9  pending_s        10  pending_bucket_s   (as they were at the reservation)
     11  limits, nanousd: window of the identifier        12  its day
     13  window of the network                            14  its day         ('' is no limit, here only)
     15  everybody's hour                                 16  everybody's day
     17  keep_s           TTL of a record past its end    18  rid   (with KEYS 12)

Reply {status, nanousd held, now_us, window nanousd, day nanousd}
  0  it holds so much now: `to`, or what there is room for, if that is at least `at_least`
  2 to 7  refused, the first limit that fails: nothing changed, no marker
  8  it has ended, is past its time, or is not known: nothing changed
  9  this id stands for something else: nothing changed
 10  too late, the caller has given up: nothing changed

Worked example: it holds 1000, to 1500, at_least 1100, the window has room for 300 more: {0, 1300, …}, every total + 300.

Promise: as reserve.lua's. `to` is the whole, so a question that is asked again charges nothing more.
]]

local SECOND = 1000000
local call, tonumber, floor, format = redis.call, tonumber, math.floor, string.format

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local to, at_least, made_at_us = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local window_s, bucket_s = tonumber(ARGV[7]), tonumber(ARGV[8])
local pending_s, pending_bucket_s = tonumber(ARGV[9]), tonumber(ARGV[10])
local made_s = floor(made_at_us / SECOND)
local DAY_ENDS_S = (floor(made_s / 86400) + 1) * 86400
local HOUR_ENDS_S = (floor(made_s / 3600) + 1) * 3600

-- Read and decide.

if now_us > tonumber(ARGV[2]) then return { 10, 0, now_us } end
local record = call('GET', KEYS[1])
if not record then return { 8, 0, now_us } end
local state, nanousd, _, request_digest, rest = string.match(record, '^(%a+) (%d+) (%d+) (%x+) (.*)$')
if request_digest ~= ARGV[3] then return { 9, 0, now_us } end
local bucket = made_s - made_s % bucket_s
-- Past its time it may have been reported as expired; and what has left the window cannot be charged to it.
local ends_us = math.min(made_at_us + pending_s * SECOND, (bucket + bucket_s + window_s) * SECOND)
if state ~= 'open' or ends_us <= now_us then return { 8, tonumber(nanousd), now_us } end

local held = tonumber(nanousd)
local reset_us = tonumber(call('GET', KEYS[11]) or nil)
local is_cleared = reset_us and made_at_us <= reset_us
local known = KEYS[12] and call('GET', KEYS[12])

-- An error names the place and not the key: that holds an identifier, which must not reach a log whole.
local function amount_at(place)
  local text = call('GET', KEYS[place])
  if not text then return 0 end
  if not string.find(text, '^%d+$') or #text > 16 then error('KEYS ' .. place .. ' holds no amount') end
  return tonumber(text)
end

-- As in reserve.lua: starts are ten digits, so they compare as text.
local over_text = format('%010.0f', floor(now_us / SECOND - bucket_s - window_s))
local function window_total(key)
  local flat, total = call('ZRANGE', key, 0, -1, 'WITHSCORES'), 0
  for i = 1, #flat, 2 do
    if flat[i] > over_text then total = total + flat[i + 1] end
  end
  return total
end

local places = {
  { status = 2, at = 3, limit = tonumber(ARGV[12]), ends_s = DAY_ENDS_S + 86400, mine = true },
  { status = 3, at = 2, limit = tonumber(ARGV[11]), window = true, mine = true },
  { status = 4, at = 4, limit = tonumber(ARGV[13]), window = true },
  { status = 5, at = 5, limit = tonumber(ARGV[14]), ends_s = DAY_ENDS_S + 86400 },
  { status = 6, at = 6, limit = tonumber(ARGV[15]), ends_s = HOUR_ENDS_S + 7200 },
  { status = 7, at = 7, limit = tonumber(ARGV[16]), ends_s = DAY_ENDS_S + 86400 },
}
local more, status = math.max(to - held, 0), 0
for _, place in ipairs(places) do
  place.key = KEYS[place.at]
  place.spent = place.window and window_total(place.key) or amount_at(place.at)
  local room = (place.limit or math.huge) - place.spent
  if place.mine and is_cleared then room = math.huge end
  if room < at_least - held and status == 0 then status = place.status end
  more = math.min(more, math.max(room, 0))
end
for i = 8, 10 do call('ZCARD', KEYS[i]) end
if status > 0 and at_least > held then return { status, held, now_us, places[2].spent, places[1].spent } end
if more == 0 then return { 0, held, now_us, places[2].spent, places[1].spent } end

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

local more_text = format('%.0f', more)
call('SET', KEYS[1], format('open %.0f %.0f %s %s', held + more, made_at_us, request_digest, rest), 'KEEPTTL')
if known then
  local body, rid, until_us = string.match(known, '^open (%x+) (%S+) %d+ (%d+)$')
  if rid == ARGV[18] then
    call('SET', KEYS[12], format('open %s %s %.0f %s', body, rid, held + more, until_us), 'KEEPTTL')
  end
end
for _, place in ipairs(places) do
  if place.mine and is_cleared then
    -- Its identifier's books were cleared since: it is not in them.
  elseif place.window then
    local now_there = tonumber(call('ZINCRBY', place.key, more_text, format('%.0f', bucket)))
    if now_there == more and call('TTL', place.key) < window_s + bucket_s then
      call('EXPIRE', place.key, window_s + bucket_s)
    end
  else
    call('INCRBY', place.key, more_text)
    if place.spent == 0 then call('EXPIRE', place.key, place.ends_s - floor(now_us / SECOND)) end
  end
end
local pending_bucket = made_s - made_s % pending_bucket_s
for i = is_cleared and 9 or 8, 10 do
  local now_there = tonumber(call('ZINCRBY', KEYS[i], more_text, format('%.0f', pending_bucket)))
  local ttl_s = pending_s + pending_bucket_s + (i == 10 and tonumber(ARGV[17]) or 0)
  if now_there == more and call('TTL', KEYS[i]) < ttl_s then call('EXPIRE', KEYS[i], ttl_s) end
end

local mine = is_cleared and 0 or more
return { 0, held + more, now_us, places[2].spent + mine, places[1].spent + mine }
