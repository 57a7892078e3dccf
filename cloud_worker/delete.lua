-- Forget a session. KEYS: record. ARGV: prefix of its chunk keys (the same hash tag, so the same slot)
local chunks = tonumber(redis.call('HGET', KEYS[1], 'chunks') or 0)
for i = 0, chunks - 1 do
  redis.call('UNLINK', ARGV[1] .. i)
end
return redis.call('UNLINK', KEYS[1])
