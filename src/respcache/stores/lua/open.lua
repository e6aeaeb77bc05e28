-- KEYS: generation. ARGV: nonce, ttl in ms. Keeps a generation of this server life, replaces any other.
-- Returns {identity, nonce, sequence}.
local id = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
if redis.call('HGET', KEYS[1], 'r') ~= id then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'n', ARGV[1], 'r', id, 's', 0)
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local head = redis.call('HMGET', KEYS[1], 'n', 's')
return {id, head[1], head[2]}
