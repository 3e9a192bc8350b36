// Package planted puts known bugs into the gateway, to prove that the crash tests would find them. A
// plant is one line in the production path:
//
//	if planted.Bug("log: acknowledged before it is written") {
//
// Without the build tag "planted" Bug is constant false, so that the compiler leaves nothing of a plant.
// With it at most one bug is active: the one that the environment variable GRAINDISK_PLANTED names.
//
// Catalogue lists the plants. Every one of them must be found by the general generator of pool's
// TestCrash; TestPlanted there runs it and replays the seeds that found them.
package planted

// Plant is one planted bug.
type Plant struct {
	Name string // as given to Bug
	File string // where it is, from the module's root
	What string // what goes wrong
}

// Catalogue lists all plants.
var Catalogue = []Plant{
	{"recovery: horizon too high", "pool/recover.go", "records above the horizon are taken for published"},
	{"recovery: caught-up cut not on record", "pool/catchup.go", "a cut read from the targets is applied, and the next one is recorded on top of it"},
	{"claim: epoch not on record", "pool/open.go", "the targets hear of an epoch that the tier does not know"},
	{"root: maps of a copy that was never committed", "pool/open.go", "a fresh host builds on the copy it surveyed, not on what its claim adopted"},
	{"cut: on record before the root", "pool/cut.go", "the tier says that a cut is published before it is"},
	{"recovery: a partial run counts as complete", "pool/state.go", "a restart takes a file that lacks pages of a map for all of it"},
	{"cut: unmaps after the blocks", "pool/cut.go", "an unmap hides what was written after it in the same cut"},
	{"reclaim: before the commit", "pool/checkpoint.go", "dead segments go while the root still names a checkpoint that has them"},
	{"reclaim: a segment one checkpoint still names", "pool/reclaim.go", "only the newest checkpoint counts when segments go"},
	{"segment: a failed shard counts as stored", "pool/upload.go", "a stripe is announced with a shard missing"},
	{"root: committed by one copy", "pool/root/claim.go", "a value counts as committed when one target has it"},
	{"recovery: what it read is not synced", "writeback/recover.go", "a power cut takes what a process crash had left"},
	{"recovery: synced but not written again", "writeback/recover.go", "pages of a failed sync count as clean and are lost"},
	{"recovery: slots change hands before they are claimed", "writeback/recover.go", "an open that fails removes what a tier made smaller since has of the log"},
	{"checkpoint: metadata log cut before it is stable", "writeback/checkpoint.go", "the header of the checkpoint is not synced when the files it replaces go"},
	{"log: sealed before it is stable", "writeback/sync.go", "the metadata log names a file that was not synced"},
	{"log: a sync counts what came while it ran", "writeback/sync.go", "a flush answers for records that were appended after the sync was issued"},
	{"log: acknowledged before it is written", "writeback/append.go", "the client hears of success while the write is still under way"},
	{"log: a checkpoint hides what is in no cut", "writeback/gather.go", "a publication during a local checkpoint says that there is nothing to publish"},
	{"log: space freed before publication", "writeback/log.go", "sealed files are given up though their records are nowhere else"},
	{"cache: slot reused without forgetting it", "grains/cache/cache.go", "a stale name finds what the slot holds now"},
	{"cache: checksum not compared", "grains/cache/cache.go", "a rotten block is returned"},
	{"write: read-modify-write without the lock", "vdisk/write.go", "two writes below a block, each in its own sectors, lose one another"},
	{"merge: the older entry wins", "vdisk/densetree/overlay.go", "a merge keeps what lies below instead of what hides it"},
	{"merge: level 0 gone before the runs hold it", "vdisk/densetree/merge.go", "an entry of level 0 is in neither when the merge is done"},
	{"merge: losses not told", "vdisk/densetree/merge.go", "blocks hidden by a merge count as alive for ever"},
	{"map: the rest of an extent is found at its start", "vdisk/densetree/entry.go", "an entry whose head was overwritten names the wrong blocks of its extent"},
	{"map: a loss told twice", "vdisk/densetree/level0.go", "a block that two writes hide in turn is counted as lost by both"},
}
