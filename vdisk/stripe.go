package vdisk

import "sync"

// stripe is a lock that many may share or one may have alone. It is sync.RWMutex for those who may wait
// long, as a write does while the tier is full: who waits here, waits at a condition, which tests that
// fake the time can tell from someone at work.
type stripe struct {
	mu      sync.Mutex
	changed sync.Cond // L is mu
	shared  int       // holders; -1 is one alone
	waiting int       // for it alone; newcomers let them go first
}

func (s *stripe) init() { s.changed.L = &s.mu }

func (s *stripe) Lock() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting++
	for s.shared != 0 {
		s.changed.Wait()
	}
	s.waiting--
	s.shared = -1
}

func (s *stripe) Unlock() {
	s.mu.Lock()
	s.shared = 0
	s.mu.Unlock()
	s.changed.Broadcast()
}

func (s *stripe) RLock() {
	s.mu.Lock()
	for s.shared < 0 || s.waiting > 0 {
		s.changed.Wait()
	}
	s.shared++
	s.mu.Unlock()
}

func (s *stripe) RUnlock() {
	s.mu.Lock()
	s.shared--
	last := s.shared == 0
	s.mu.Unlock()
	if last {
		s.changed.Broadcast()
	}
}
