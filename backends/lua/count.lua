--[[
count: one more request of a network and of a caller in it, in fixed windows: it counts in all of them, or in none.

KEYS  per window llm:rate:<digest>  string  requests in a window that began with the first: the network's windows, then the caller's
      made       llm:rate:<digest>  string  how many of the caller's counters this network has made, in a time as long as they live
ARGV  1  free       how many of the windows, from the first on, are counted whatever `made` says
      2  most_made  what is beyond it is not counted: a caller that takes a new name for each request is bounded by its network
      3  made_s     TTL of `made`
      then per window: limit, length in seconds
Reply {number, ms}: 0 0 counted; else the first window that is full, from 1 on, and until when it lasts: nothing was written.

Promise: a window's TTL begins with its first request, and nothing prolongs it. One network makes no more than `most_made` keys, and
one more for each window that is free, in `made_s`.
]]

local WINDOWS, FREE, MOST_MADE = #KEYS - 1, tonumber(ARGV[1]), tonumber(ARGV[2])
local counted = redis.call('MGET', unpack(KEYS))
for number = 1, WINDOWS do
  if counted[number] and tonumber(counted[number]) >= tonumber(ARGV[2 * number + 2]) then
    return { number, redis.call('PTTL', KEYS[number]) }
  end
end

local made_before = tonumber(counted[WINDOWS + 1] or 0)
local made = made_before
for number = 1, WINDOWS do
  if counted[number] then
    redis.call('INCRBY', KEYS[number], 1)
  elseif number <= FREE or made < MOST_MADE then
    redis.call('SET', KEYS[number], 1, 'EX', ARGV[2 * number + 3])
    if number > FREE then made = made + 1 end
  end
end
if made > made_before then
  if made_before == 0 then
    redis.call('SET', KEYS[WINDOWS + 1], made, 'EX', ARGV[3])
  else
    redis.call('INCRBY', KEYS[WINDOWS + 1], made - made_before)
  end
end
return { 0, 0 }
