-- Read the record and a part of one chunk at the same instant.
-- KEYS: record, chunk. ARGV: first byte, last byte, session key
-- Returns {shape, generation, position, bytes}, or {} when there is no record.
-- Whoever does not know the session's key has no right to it: keys are named by its SHA-1.
local home = 'midspan:{' .. redis.sha1hex(ARGV[3]) .. '}:'
for i = 1, #KEYS do
  if string.sub(KEYS[i], 1, #home) ~= home then
    return redis.error_reply('FOREIGN this session was not given to the caller')
  end
end
local record = redis.call('HMGET', KEYS[1], 'shape', 'generation', 'position')
if not record[1] then
  return {}
end
return {record[1], tonumber(record[2]), tonumber(record[3]),
  redis.call('GETRANGE', KEYS[2], ARGV[1], ARGV[2])}
