"""What edge, broker and worker share: errors, settings, messages, wire format, codecs and spans."""
