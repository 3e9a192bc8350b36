// Package writeback keeps acknowledged writes on the local tier until a cut that holds them is
// published: the log, its index, the metadata log, local checkpoints, and recovery from them.
//
// A log file fills one slot of the tier. Everything is in 4 KiB blocks, integers are little-endian.
// docs/FORMATS.md draws every byte; in short:
//
//	slot-NNNNNN   | file header | batch | batch | …
//	batch         | header: fixed part, entries, one CRC per payload block | payload blocks |
//	entry         {kind, disk, lba, blocks}   DATA, UNMAP, OP; (DATAREF is reserved)
//	meta-NNNNNN   | file header | record | record | …      each synced before the next is written
//	ckpt-A, -B    | header | index of unpublished blocks | state of the pool |
//	identity      who the log is, written once
//
// Every checksum of a header is seeded with the log's term, drawn afresh at each open, and every
// header states its own place, so neither what an earlier lap left in a slot nor guest data that
// copies a header can pass for a batch. Block checksums are plain CRC32C: the cache keeps them.
//
// Invariants:
//   - seq rises by exactly one per record, across files; a record is visible, counted written and
//     counted stable only after all before it. Several batches may be in flight.
//   - a sync covers what was complete before it was issued, nothing more.
//   - a file gets its Sealed record only when all of it is stable, in file order; so the files
//     recovery must scan are those after the last Sealed record.
//   - a slot becomes clean only when its file is sealed and all its records are at or below the
//     committed horizon (Publish).
//   - after a failed write or sync of a file nothing more is written to it: its content is written into
//     a fresh one that takes its name and place, before anything else is built, shown or synced
//     (mend.go). If that cannot be done, the log stops (ErrFailed); reading goes on.
//   - what the file system refuses for want of space, or because it is read-only, is tried again until
//     it is taken; meanwhile appends wait, nothing is lost, and Health says why.
//
// # Checkpoints
//
// FreezeAndRotate starts a new metadata file and then freezes the index at S, both under the
// metadata lock. A Sealed record in an older metadata file was written before, and its file was full
// by then, so all its records were in the index: they are at or below S. A Sealed record written
// later is in the new file and replayed; its records at or below S are skipped, since the checkpoint
// holds their net effect or they were published. The checkpoint is written only once the log is
// stable through S, and only after its header is synced are the older metadata files removed.
//
// # Recovery
//
// Open reads the newest valid checkpoint, replays the metadata files from the one it names, and
// scans the files of the current term that have no Sealed record, in file order, up to the first
// batch that is not whole. If any header found beyond that claims a stable sequence at or above the
// missing one, the log is damaged and Open refuses; otherwise it is a torn tail, and the log ends
// there. Everything read is then synced and sealed, and a Term record starts the new term; a crash
// before that record leaves the old state, and files of the old term beyond the end are void after it.
package writeback
