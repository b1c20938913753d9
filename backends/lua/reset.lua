--[[
reset: an identifier's books are cleared. What its network and everybody have spent stays: that money is gone.

KEYS  1  llm:reset:<id>                  string  us: what was reserved up to then is not in the identifier's books any more
      2  llm:throttle:<id>               as in reserve.lua
      3  llm:cost:recent:<id>            4  llm:open:identifier:<id>
      5 to 7  llm:cost:daily:<id>:<date>   of the caller's day, the day before and the day after: whatever Redis' clock
              says, today and yesterday are among them

ARGV  1  now_us   '' in production: Redis' own TIME; a number in tests
      2  keep_s   TTL of KEYS 1

Reply {now_us, marker, window, pending, day, day, day}: the marker 1 or 0; nanousd that were cleared of the others, in the order of KEYS

Worked example: a marker, 4050000 in the window, all of it pending, 9000000 of today:
{now, 1, '4050000', '4050000', '9000000', '0', '0'}; amounts are strings, since they were never looked at as numbers of Lua's.

Promise: a reservation is either made before this (then its identifier's books forget it, and its settlement leaves them
alone) or after (then it is in them, and stays). The two are told apart by the time at which each was made, so this script
ends only when the clock has moved on: nothing that comes later can be made in its microsecond.
]]

local SECOND, PATIENCE = 1000000, 100
local call, format = redis.call, string.format

local function time_us()
  local time = call('TIME')
  return time[1] * SECOND + time[2]
end
local now_us = tonumber(ARGV[1]) or time_us()

local function window_total(key)
  local flat, total = call('ZRANGE', key, 0, -1, 'WITHSCORES'), 0
  for i = 2, #flat, 2 do total = total + flat[i] end
  return format('%.0f', total)
end

-- Read.

local marker = call('EXISTS', KEYS[2])
local window, pending = window_total(KEYS[3]), window_total(KEYS[4])
local days = {}
for i = 5, 7 do days[i] = call('GET', KEYS[i]) or '0' end

-- Write: the mark first, since a server that takes no writes refuses here, before anything has changed.

call('SET', KEYS[1], format('%.0f', now_us), 'EX', ARGV[2])
for i = 2, 7 do call('DEL', KEYS[i]) end

-- Redis 7.2 and Valkey stop their clock while a script runs: there it cannot be seen to move, but going round takes
-- many microseconds, and the next script starts with a look at it.
local tries = 0
while tries < PATIENCE and ARGV[1] == '' and time_us() <= now_us do tries = tries + 1 end

return { now_us, marker, window, pending, days[5], days[6], days[7] }
