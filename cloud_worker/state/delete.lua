-- Forget a session. KEYS: record. ARGV: session key
-- Returns the key of the account that it counts for, if it does.
-- Whoever does not know the session's key has no right to it: keys are named by its SHA-1.
local home = 'midspan:{' .. redis.sha1hex(ARGV[1]) .. '}:'
for i = 1, #KEYS do
  if string.sub(KEYS[i], 1, #home) ~= home then
    return redis.error_reply('FOREIGN this session was not given to the caller')
  end
end
local record = redis.call('HMGET', KEYS[1], 'chunks', 'account')
local chunks = tonumber(record[1] or 0)
for i = 0, chunks - 1 do
  redis.call('UNLINK', home .. 'kv:' .. i)
end
redis.call('UNLINK', KEYS[1])
return record[2] or ''
