-- KEYS: generation. ARGV: ttl in ms, highest number of fields, tags. Returns the identity of this server life.
-- No generation: nothing depends on it. One of another server life: it is deleted. Otherwise the sequence advances and
-- stands on every tag. Too many fields are forgotten by raising the floor to the new sequence, which invalidates everything.
local id = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local recorded = redis.call('HGET', KEYS[1], 'r')
if not recorded then
  return id
end
if recorded ~= id then
  redis.call('DEL', KEYS[1])
  return id
end
local sequence = redis.call('HINCRBY', KEYS[1], 's', 1)
for i = 3, #ARGV do
  redis.call('HSET', KEYS[1], ARGV[i], sequence)
end
if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[2]) then
  local nonce = redis.call('HGET', KEYS[1], 'n')
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'n', nonce, 'r', id, 's', sequence, '*', sequence)
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return id
