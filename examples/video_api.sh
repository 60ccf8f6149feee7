#!/bin/sh
# Makes a video over HTTP: asks for it, waits until it is made, downloads it, and removes it from the server.
#
#   rfengine serve                           # in another terminal
#   examples/video_api.sh out.mp4            # RFENGINE_KEY=... where the server has access keys
#
# It needs curl alone. RFENGINE_URL is the server, http://localhost:8000 where it is not set.
set -eu

output=${1:?"give the MP4 to write, as: examples/video_api.sh out.mp4"}
videos=${RFENGINE_URL:-http://localhost:8000}/v1/videos

# The key comes in a file of options, since every user of the machine could read it on the command line.
call() {
    printf 'header = "Authorization: Bearer %s"\n' "${RFENGINE_KEY:-none}" |
        curl --config - --silent --show-error --fail-with-body "$@"
}

# One text field of a JSON object, as far as an example needs it.
field() {
    sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p"
}

video=$(call "$videos" --header "Content-Type: application/json" --data '{
    "prompt": "a large yellow triangle moving slowly upwards over a grassy meadow",
    "seconds": 4,
    "seed": 7
}') || { echo "$video" >&2; exit 1; }
id=$(echo "$video" | field id)

while :; do
    video=$(call "$videos/$id")
    case $(echo "$video" | field status) in
        completed) break ;;
        failed) echo "$video" >&2; exit 1 ;;
    esac
    sleep 1
done

call "$videos/$id/content" --output "$output"
call "$videos/$id" --request DELETE >/dev/null
echo "$output: $id"
