-- Read the record and a part of one chunk at the same instant.
-- KEYS: record, chunk. ARGV: first byte, last byte
-- Returns {shape, generation, position, bytes}, or {} when there is no record.
local record = redis.call('HMGET', KEYS[1], 'shape', 'generation', 'position')
if not record[1] then
  return {}
end
return {record[1], tonumber(record[2]), tonumber(record[3]),
  redis.call('GETRANGE', KEYS[2], ARGV[1], ARGV[2])}
