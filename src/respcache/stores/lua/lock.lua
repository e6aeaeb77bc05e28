-- Takes a fill lock.
-- KEYS: lock. ARGV: token, value, time to live in ms, token that may be replaced (or '').
-- Returns the value in force afterwards.
local present = redis.call('GET', KEYS[1])
if present and string.match(present, '^%S+') ~= ARGV[4] then
  return present
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return ARGV[2]
