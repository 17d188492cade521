#!/bin/sh
# Back up a running compose stack: `scripts/compose_backup.sh FOLDER`, from the folder of docker-compose.yml.
# FOLDER must not exist yet. It gets the database, with the API keys, and the artifacts with the mirrored checkpoints of unfinished jobs: of
# the stack's own PostgreSQL and volume alone. Ends with an error, and says why, if anything of these is not in it.
set -eu
export LC_ALL=C  # one order for all that sorts and compares
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }

fail() { echo "$0: $1" >&2; exit 1; }

# A stack that uses another database or store still has its own, and those are empty or old.
config=$(docker compose config)
elsewhere=$(printf '%s\n' "$config" | sed -nE '/: (""|null|\/run\/secrets\/cliprd\/database_url)$/d
    s/^ +(CLIPRD_(DATABASE_URL|ARTIFACTS_URL)(_FILE)?): .*/\1/p' | sort -u | paste -s -d' ' -)
[ -z "$elsewhere" ] || fail "the stack uses what is not its own ($elsewhere); back up that database or store with its own tools"

umask 077
mkdir "$1"
lists=$(mktemp -d)
trap 'rm -r "$lists"' EXIT
# As `sha256sum` writes it.
query="SELECT sha256 || '  ' || storage_key FROM artifacts ORDER BY sha256, storage_key"
query() { docker compose exec -T postgres psql --username=cliprd --no-psqlrc --tuples-only --no-align --command="$1"; }

# The database first: an artifact's file is there before its row, so every row of the dump has its file unless it is deleted meanwhile.
docker compose exec -T postgres pg_dump --username=cliprd --format=custom cliprd >"$1/database.dump"
docker compose exec -T postgres pg_restore --list <"$1/database.dump" >"$lists/contents"
grep -q ' TABLE DATA public alembic_version ' "$lists/contents" || fail "the database is empty: nothing of cliprd is in it"
query "$query" >"$lists/dumped"
# What can't be read is a warning here, since a file may be deleted meanwhile, and is found below.
docker compose exec -T api sh -c 'cd /var/lib/cliprd/artifacts && find . -type f ! -name "*.tmp" ! -name ".*" -printf "%P\0" |
    tar --create --null --ignore-failed-read --files-from=-' >"$1/artifacts.tar"
query "$query" >"$lists/still_there"

# All is read back: a file that can't be read to its end is zeros in the archive from there on.
comm -12 "$lists/dumped" "$lists/still_there" >"$lists/expected"
tar --extract --file="$1/artifacts.tar" --to-command='echo "$(sha256sum | cut -c-64)  $TAR_FILENAME"' >"$lists/archived"
sort -o "$lists/archived" "$lists/archived"
comm -23 "$lists/expected" "$lists/archived" >"$lists/missing"
if [ -s "$lists/missing" ]; then
    keys=$(sed "s/.*  \(.*\)/'\1'/" "$lists/missing" | paste -s -d, -)
    query "SELECT job_id, kind, group_name || '/' || name, storage_key FROM artifacts WHERE storage_key IN ($keys)" >&2
    fail "the backup lacks these artifacts, or holds damaged copies of them (job | kind | name | file in the volume \`artifacts\`)"
fi
du -h "$1"/*
