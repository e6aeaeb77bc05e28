-- Releases a fill lock if the token owns it.
-- KEYS: lock. ARGV: token.
local present = redis.call('GET', KEYS[1])
if present and string.match(present, '^%S+') == ARGV[1] then
  return redis.call('DEL', KEYS[1])
end
return 0
