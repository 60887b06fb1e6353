"""What the parts of the check do. Each function takes a Context and hands its findings to it one by one."""
