// Package nbd serves disks over the Network Block Device protocol, fixed newstyle, on any
// stream listener. Integers on the wire are big-endian.
//
//	0       8       16   18                    the server's greeting; the client answers
//	+-------+-------+----+                     with its u32 flags
//	| magic | magic | fl |
//	+-------+-------+----+
//	0       8       12    16                   option haggling: INFO, LIST, ... until
//	+-------+-------+-----+----------+         GO or EXPORT_NAME starts transmission
//	| magic | option| len | data ... |  C
//	+-------+-------+-----+----------+
//	| magic | option| type| len | data ... |  S
//	+-------+-------+-----+-----+----------+
//	0       4    6      8        16       24    28
//	+-------+----+------+--------+--------+-----+----------+
//	| magic | fl | type | cookie | offset | len | data ... |  request
//	+-------+----+------+--------+--------+-----+----------+
//	| magic | error     | cookie | data ... |  simple reply
//	+-------+----+------+--------+-----+----+-----+
//	| magic | fl | type | cookie | len | data ... |  structured reply chunk
//	+-------+----+------+--------+-----+----------+
//	0       4    6      8        16       24    32
//	+-------+----+------+--------+--------+-----+----------+
//	| magic | fl | type | cookie | offset | len | data ... |  with extended headers: request and reply chunk
//	+-------+----+------+--------+--------+-----+----------+
//
// With extended headers, len of a request is that of the data that follow if the flag PAYLOAD_LEN is set, which
// WRITE has and nothing else, and else that of the range, up to 2^63-1; every reply is a chunk, which repeats the
// request's offset.
//
// Offered, and nothing else: EXPORT_NAME, LIST, INFO, GO, ABORT, STARTTLS where the listener has TLS,
// STRUCTURED_REPLY, EXTENDED_HEADERS, LIST_META_CONTEXT and SET_META_CONTEXT with base:allocation; READ (with DF), WRITE, FLUSH, TRIM, WRITE_ZEROES
// (NO_HOLE, FAST_ZERO), CACHE, BLOCK_STATUS (REQ_ONE), FUA on everything, DISC, multi-conn, block sizes
// 1/4096/32 MiB. Other options are answered UNSUP, other requests EINVAL. What a device cannot do is not offered.
//
//   - base:allocation tells data, or hole and zero; an answer has at most 2048 ranges and ends with the request.
//   - NO_HOLE changes nothing: what is zeroed takes no space, and to write there later costs no more and fails no
//     sooner than anywhere else. BLOCK_STATUS tells it as a hole.
//   - FAST_ZERO is refused with ENOTSUP unless the range is whole blocks: to zero part of a block may wait for
//     the store and for room, as to write it.
//   - CACHE brings up to 1 GiB of the range to the local tier and is answered then.
//
// On a unix socket the kernel is asked to hold 1 MiB of replies, so that a large READ goes out in one call; it
// gives that to root, and to others up to net.core.wmem_max.
//
// Limits on strangers: the handshake must end in time however it goes on, has at most 256 options of at most
// 64 KiB, and names of 4096 bytes. In transmission a client may be silent for ever, in the midst of a request
// too: a machine that was suspended there must find its disk as it was. Data longer than 32 MiB end the
// connection (compact headers: longer than 64 MiB, else they are skipped and refused).
//
// One connection:
//
//	socket ─► reader ─┬─ cached READ ────────────────► replies ─► outbox ─► socket
//	                  ├─ other READ ► a goroutine ─ part by part ►   ▲
//	                  ├─ WRITE, TRIM, ZEROES ► batch ► lane ─────────┤
//	                  ├─ CACHE, BLOCK_STATUS ► a goroutine ──────────┤
//	                  └─ FLUSH ► flusher (one at a time) ────────────┘
//
// The reader takes every request its buffer holds before it touches the socket again: cached
// reads are copied straight into the outgoing buffer, neighbouring writes gather in a batch. Only
// then (settle) do batches go to their lanes and replies to the socket, so under depth system
// calls per request fall below one. A lane applies one batch at a time and whatever gathered
// meanwhile is its next one. A batch that the device promises not to make wait, and a FLUSH with
// nothing else under way, are applied by the reader itself. Lanes, slow reads and the flusher run in goroutines of their own, so
// a write that waits for room or a read that waits for a store delays no cached read; operations
// without data have a lane to themselves, since unmapping must pass when writes may not.
//
// With replies in chunks and without DF, a READ that must wait is answered in chunks as its parts come:
// what is local at once, neighbours that came together in one chunk, OFFSET_HOLE for holes of 64 KiB and
// more, ERROR_OFFSET for a part that failed, DONE on the last.
//
// TLS is 1.3 with X.509 certificates. Where it is required, every option before it but ABORT is
// answered TLS_REQD, and EXPORT_NAME by the end of the connection.
//
//	client  ── STARTTLS ─►         plain text that comes along with it ends the connection
//	        ◄──── ACK ────
//	        ◄═ handshake ═►        within the time of the whole handshake
//	        ══ options ═══►        from the beginning: what plain text agreed on is forgotten
//
// Who a client is (package access) and what it may do is settled when it asks for an export. One that
// it may not open is not listed and answers as if it did not exist, so that names cannot be guessed;
// with a grant to read, the export is read-only.
//
// Invariants:
//   - Every buffer is counted in a budget of its connection until its reply is on the socket or
//     its write is applied; when a budget is spent the reader stops reading.
//   - No reply waits in the reader's hands while the reader waits for anything.
//   - A request that reached the device is answered or its connection is closed; an unanswered
//     request may have taken effect. What was read before a DISC is done even if the client has gone,
//     unless that takes more than half a minute; a client that goes without one has all it asked for cancelled.
//   - A reply leaves only after the device was asked, once what it tells was done, whether it may (Holder): one
//     that was lost to another server while this process stood still acknowledges nothing more.
//   - No byte of plain text has an effect after STARTTLS, and none but STARTTLS and ABORT where TLS is
//     required.
//   - A FLUSH covers every write completed before it on any connection (the device's promise), of clients that
//     have gone too. Where a client may outlive the host, AckStable acknowledges nothing that a power cut can
//     take back; so its FLUSH after a reconnect never covers a lost write.
//     Writes read before it on its own connection are given 20 ms to go first; the protocol does
//     not ask for it, and a full log must not hold a FLUSH.
package nbd
