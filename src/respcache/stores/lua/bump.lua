-- KEYS: generation. ARGV: ttl in ms, highest number of fields, tags. Returns the identity of this server life.
-- No generation: nothing depends on it. One of another server life, one that lost a part of its head (its sequence would
-- begin again under the same nonce), or a foreign value: it is deleted. Otherwise the sequence advances and stands on every
-- tag. Too many fields are forgotten by raising the floor to the new sequence, which invalidates everything.
local id = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local head = redis.pcall('HMGET', KEYS[1], 'r', 'n', 's')
if head.err or head[1] ~= id or not head[2] or not string.match(head[3] or '', '^%d+$') then
  redis.call('DEL', KEYS[1])
  return id
end
local sequence = redis.call('HINCRBY', KEYS[1], 's', 1)
for i = 3, #ARGV do
  redis.call('HSET', KEYS[1], ARGV[i], sequence)
end
if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[2]) then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'n', head[2], 'r', id, 's', sequence, '*', sequence)
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return id
