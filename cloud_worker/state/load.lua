-- What a session's record says, for a load: a transaction with the GETRANGE of a chunk, so that both
-- are of the same instant. The chunk does not come through here: Lua would copy it once more, into
-- memory that it gets and gives back each time.
-- KEYS: record. ARGV: session key
-- Returns {shape, generation, position}, or {} when there is no record.
-- Whoever does not know the session's key has no right to it: keys are named by its SHA-1.
local home = 'midspan:{' .. redis.sha1hex(ARGV[1]) .. '}:'
for i = 1, #KEYS do
  if string.sub(KEYS[i], 1, #home) ~= home then
    return redis.error_reply('FOREIGN this session was not given to the caller')
  end
end
local record = redis.call('HMGET', KEYS[1], 'shape', 'generation', 'position')
if not record[1] then
  return {}
end
return {record[1], tonumber(record[2]), tonumber(record[3])}
