// Package root keeps the one mutable object of a pool: who owns it and what is published. It is a
// register over a majority of the pool's targets, each of which holds one copy under the key "root":
// multi-Paxos with a stable leader, its acceptors being objects that change by conditional put alone.
//
// A copy is readable JSON; the first line and the crc stay where they are in every later format:
//
//	{"magic":"graindisk root","format":1,"incompat":0,
//	"pool":"<uuid>","member":"<uuid>",            whose copy this is; never changes
//	"promised":{"epoch":7,"claimant":"<uuid>"},   no ballot below this one is accepted any more
//	"accepted":{"epoch":7,"claimant":"<uuid>"},"ver":19,
//	"value":{"format":1,"cfg":{...},"owner":"<log uuid>","state":"held",...},
//	"nonce":"<uuid>",                             fresh in each put, so that no two bodies share an ETag
//	"crc":"89abcdef"}                             CRC32C of every byte before "crc", eight hex digits
//
// Two rules change a copy, always from the state a conditional put confirms:
//
//	promise(B)         promised > B: refused    promised = B: done    else promised := B
//	accept(B,ver,val)  promised > B: refused    accepted >= (B,ver): done
//	                   else promised := B, accepted := (B,ver,val)
//
// A claim makes a quorum promise a new ballot, adopts the highest value accepted among their answers
// and writes it again as its own; a commit makes a quorum accept the next version under that ballot:
//
//	survey ──► held by another log, no consent: *HeldError; nothing was written
//	  ▼
//	promise B on all ──► no quorum, or refused: back off, survey again
//	  ▼
//	adopt the highest accepted value; owner and consent are checked again on *that* value
//	  ▼
//	accept (B, ver+1, value) ──► quorum: claimed / committed
//	  ├──► nothing proven by the deadline: ErrUnknown; repeat the same value
//	  └──► refused: promise a higher B; goes on only if the highest value is our own, else ErrFenced
//
// Members change by way of a configuration that holds both sets:
//
//	seed the new copies ──► commit cfg{no+1, members, next} ──► commit cfg{no+2, members: next}
//	                        while next is set, a quorum is      (or members again: taken back)
//	                        a majority of members and one of next
//
// Whoever claims a pool in the middle of a change adopts it with the value and finishes it. A seed is the
// copy of a member nobody has named yet: accepted {0}, ver 0, value {format, cfg} for people only.
//
// Invariants:
//   - promised and accepted of a copy only rise; (ballot, version) names one value for ever.
//   - a committed value is never lost: every later committed value was made from it.
//   - an epoch has at most one tenure: a claim that adopts a value of its own epoch takes a higher one.
//   - a copy that is missing, unreadable or another pool's is down. It is never taken for an empty one:
//     it may have promised before it was lost. Copies come into being in Create and Seed alone, in Seed
//     under a uuid that no configuration ever named.
//   - copies count by the member's uuid, not by their place: a seed is nobody's vote but its own.
//   - a member that two targets show counts once, under the target it was first seen at.
package root
