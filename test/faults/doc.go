// Package faults runs a gateway on stores and networks that misbehave all the time: guests must not notice.
//
//	                               ┌► handler ──────────────────────────────────────► MinIO
//	fio, client ─► gateway ─► toxiproxy       503, 500 after the effect, half a body,
//	                               └► handler   reset, delivered twice ─────────────► Azurite
//	                latency, resets, blackholes
//
// GRAINDISK_SOAK=5m makes the load last five minutes (up to an hour), GRAINDISK_SEED repeats what the handlers
// draw. Under the race detector (GRAINDISK_RACE=1) it lasts half a minute, with shorter blackholes.
package faults
