"""The published methods as schedules: guard x forecast x regions. The public face is `diffcache_fx.schedules`."""
