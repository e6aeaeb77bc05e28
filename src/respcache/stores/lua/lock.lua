-- KEYS: lease. ARGV: token, value, ttl in ms, token that may be replaced (or ''). Returns the value in force afterwards.
local held = redis.call('GET', KEYS[1])
if held and string.match(held, '^%S+') ~= ARGV[4] then
  return held
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return ARGV[2]
