--[[
consume: a challenge is good once, for the hash and the network that it was given to; found good, it is used up, in one step.

KEYS  1  llm:challenge:<challenge>   string  "<hash> <network>"
ARGV  1  "<hash> <network>" of who shows it now
An unknown one is written and taken away again, so that a server that takes no writes answers with an error.
Reply {status}: 0 good, and gone now; 1 unknown (never given, used, or over); 2 given to somebody else (it stays theirs)
]]

local given_to = redis.call('GET', KEYS[1])
if not given_to then
  -- A server that takes no writes has stored no challenge either: it says so here, and no visitor is refused for it.
  redis.call('SET', KEYS[1], '', 'EX', 1)
  redis.call('DEL', KEYS[1])
  return { 1 }
end
if given_to ~= ARGV[1] then return { 2 } end
redis.call('DEL', KEYS[1])
return { 0 }
