#!/bin/sh
# Back up a running compose stack: `scripts/compose_backup.sh FOLDER`, from the folder of docker-compose.yml.
# FOLDER must not exist yet. It gets the database, with the API keys, and the artifacts with the mirrored checkpoints of unfinished jobs.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
umask 077
mkdir "$1"
# The database first: an artifact's file is there before its row, so every row of the dump has its file unless it is deleted meanwhile.
docker compose exec -T postgres pg_dump --username=cliprd --format=custom cliprd >"$1/database.dump"
docker compose exec -T api sh -c 'cd /var/lib/cliprd/artifacts && find . -type f ! -name "*.tmp" ! -name ".*" -print0 |
    tar --create --null --ignore-failed-read --files-from=-' >"$1/artifacts.tar"
# A whole archive ends in 1024 zero bytes, which one that was cut off lacks; both are read back here.
tar --list --file="$1/artifacts.tar" >/dev/null
docker compose exec -T postgres pg_restore --list <"$1/database.dump" >/dev/null
du -h "$1"/*
