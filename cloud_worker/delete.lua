-- Forget a session. KEYS: record. ARGV: session key
-- Whoever does not know the session's key has no right to it: keys are named by its SHA-1.
local home = 'midspan:{' .. redis.sha1hex(ARGV[1]) .. '}:'
for i = 1, #KEYS do
  if string.sub(KEYS[i], 1, #home) ~= home then
    return redis.error_reply('FOREIGN this session was not given to the caller')
  end
end
local chunks = tonumber(redis.call('HGET', KEYS[1], 'chunks') or 0)
for i = 0, chunks - 1 do
  redis.call('UNLINK', home .. 'kv:' .. i)
end
return redis.call('UNLINK', KEYS[1])
