--[[
book: what an instance has spent of its emergency budget in one UTC hour is booked into everybody's hour and day, once.

KEYS  record  llm:emergency:<instance>:<date>T<hour>  string  as of a reservation, which has ended: settled <nanousd>
              <hour_began_us> <edition> 0 0 - -
      hour    llm:global:hourly:<date>T<hour>         string  as in reserve.lua
      day     llm:global:daily:<date>                 string  as in reserve.lua

ARGV  1  now_us         '' in production: Redis' own TIME; a number in tests
      2  edition        grows with each change of what the instance knows
      3  nanousd        all that it has spent in that hour as of this edition, >= 0
      4  hour_began_us  5  hour_keep_until_s   6  day_keep_until_s   unix time: when the keys of the totals may go

Reply {status, change in nanousd, now_us}
  0  booked: the day and, unless that is over, the hour have changed by `change`
  1  repeated: this edition or a later one is booked, nothing changed
  2  the day is over, or begins only tomorrow: nothing changed

Worked example: 4050000 is booked as of edition 1. An answer that had begun used 1012500 less, so edition 2 says 3037500: both
totals go down by 1012500, {0, -1012500, now}. Edition 1, sent again, is {1, 0, now}.

Promise: however often it is sent, and in whatever order, what is booked is what the latest edition says. No total goes below zero, and one
that has aged out is not made again.
]]

local SECOND, DAY_S = 1000000, 86400
local call, tonumber, ipairs, floor, max = redis.call, tonumber, ipairs, math.floor, math.max
local format, match, find = string.format, string.match, string.find

local now_us = tonumber(ARGV[1])
if not now_us then
  local time = call('TIME')
  now_us = time[1] * SECOND + time[2]
end
local now_s, keep_until_s = floor(now_us / SECOND), { tonumber(ARGV[5]), tonumber(ARGV[6]) }

-- Read and decide.

if now_s >= keep_until_s[2] or ARGV[4] / SECOND > now_s + DAY_S then return { 2, 0, now_us } end
local booked, edition = match(call('GET', KEYS[1]) or '', '^settled (%d+) %d+ (%d+) ')
if edition and tonumber(edition) >= tonumber(ARGV[2]) then return { 1, 0, now_us } end
local change, held = ARGV[3] - (booked or 0), {}
for i in ipairs(keep_until_s) do
  local text = call('GET', KEYS[1 + i])
  if text and (not find(text, '^%d+$') or #text > 16) then error('KEYS ' .. 1 + i .. ' holds no amount') end
  held[i] = text or ''
end

-- Write: the record first, since a server that takes no writes refuses here, before anything has changed.

call('SET', KEYS[1], format('settled %s %s %s 0 0 - -', ARGV[3], ARGV[4], ARGV[2]), 'EX', keep_until_s[2] - now_s)
for i, until_s in ipairs(keep_until_s) do
  local its = max(change, -(tonumber(held[i]) or 0))
  if until_s > now_s and its ~= 0 then
    call('INCRBY', KEYS[1 + i], format('%.0f', its))
    if held[i] == '' then call('EXPIRE', KEYS[1 + i], until_s - now_s) end
  end
end

return { 0, change, now_us }
