"""Commands of `mvlm`, one file a command or a group of commands: parse, call, print."""
