--[[
reset: an identifier's books are cleared. What its network and everybody have spent stays: that money is gone.

KEYS  reset        llm:reset:<id>            string  us: what was reserved up to then is not in the identifier's books any more
      marker       llm:throttle:<id>         as in reserve.lua
      pending      llm:open:identifier:<id>
      per window   as keys.py makes it       zset
      per total    the same                  string, of each period that may be the present one, whatever Redis' clock says
      the rest     llm:running:…             hints that go with the windows

ARGV  1  now_us   '' in production: Redis' own TIME; a number in tests
      2  keep_s   TTL of the first key
      3  windows  4  totals   how many there are

Reply {now_us, marker, pending, ...}: the marker 1 or 0; nanousd that were cleared of the others, windows and totals in the
order of KEYS

Worked example: a marker, 4050000 in the window, all of it pending, 9000000 of today:
{now, 1, '4050000', '4050000', '9000000', '0', '0'}; amounts are strings, since they were never looked at as numbers of Lua's.

Promise: a reservation is either made before this (then its identifier's books forget it, and its settlement leaves them
alone) or after (then it is in them, and stays). The two are told apart by the time at which each was made, so this script
ends only when the clock has moved on: nothing that comes later can be made in its microsecond.
]]

local SECOND, PATIENCE, FIRST = 1000000, 100, 3
local call, format = redis.call, string.format

local function time_us()
  local time = call('TIME')
  return time[1] * SECOND + time[2]
end
local now_us = tonumber(ARGV[1]) or time_us()

local function sum_of_buckets(key)
  local flat, total = call('ZRANGE', key, 0, -1, 'WITHSCORES'), 0
  for i = 2, #flat, 2 do total = total + flat[i] end
  return format('%.0f', total)
end

-- Read.

local reply = { now_us, call('EXISTS', KEYS[2]) }
local last_window = FIRST + ARGV[3]
for i = FIRST, last_window do reply[i] = sum_of_buckets(KEYS[i]) end
for i = last_window + 1, last_window + ARGV[4] do reply[i] = call('GET', KEYS[i]) or '0' end

-- Write: the mark first, since a server that takes no writes refuses here, before anything has changed.

call('SET', KEYS[1], format('%.0f', now_us), 'EX', ARGV[2])
for i = 2, #KEYS do call('DEL', KEYS[i]) end

-- Redis 7.2 and Valkey stop their clock while a script runs: there it cannot be seen to move, but going round takes
-- many microseconds, and the next script starts with a look at it.
local tries = 0
while tries < PATIENCE and ARGV[1] == '' and time_us() <= now_us do tries = tries + 1 end

return reply
