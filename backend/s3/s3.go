// Package s3 is the driver for S3 and what speaks like it. An object under key k is the object
// <prefix>/k of the bucket.
//
// What it asks of a store, which `pool check` proves: PUT with If-None-Match: * and If-Match decides
// between rivals; GET with Range; a read after a write sees it; ListObjectsV2 is in byte order (S3's
// directory buckets are not). It never uses conditional DELETE or COPY, or versions: stores differ too
// much there.
//
// Objects above a size are put in parts, which become an object, whole, by a last request; that one carries
// the condition. A copy with a condition is made the same way, of one part. What a failed put
// leaves behind it takes away; what a killed process leaves behind is found by Inspect where the server lists
// it (Amazon does; MinIO does not, and removes it after a day by itself).
//
// Retries. A conditional put is sent once, so that its refusal is never the echo of its own lost
// success. Everything else is sent up to Options.Attempts times within about a second; longer patience, limits
// and time-outs are for the caller (backend/adaptive and ctx). The gateway sets Attempts to 1: what the driver
// sends again by itself is not counted, keeps to no limit, and hides from adaptive that a store throttles.
// What the SDK sends again has a class that adaptive sends again.
//
// Time. A request that is refused and was dated more than four minutes off the store's own time is Transient:
// the next one is dated by the store's clock.
//
// Credentials may be rotated while the store is open: Refresh, which backend/adaptive calls when they are refused,
// reads them again from where they come. Calls under way end with those they began with.
//
// Integrity. Every PUT carries the body's CRC32C, which the store checks and keeps; a whole GET is
// checked against it (Options.Checksum turns that off for servers that refuse it). The SHA-256 of the payload is
// left out of the signature, since without the processor's help it costs more than everything else together.
package s3

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"graindisk/backend"
	"graindisk/backend/transport"
)

// Options name a bucket and how to get at it.
type Options struct {
	Bucket    string // must exist
	Prefix    string // "" or a folder within the bucket, itself a valid key
	Region    string // default: what the SDK's own chain says; with an Endpoint, us-east-1
	Endpoint  string // "http://127.0.0.1:9000"; default: Amazon's for the region
	PathStyle bool   // bucket in the path and not in the host name; most other servers want it
	CAFile    string // PEM file of certificate authorities, instead of the system's

	// Attempts of a request, but for the one that carries a put's condition, which is sent once; default 3. 1 is for
	// who tries again himself, and wants every request counted and within his limits.
	Attempts int

	// MultipartAbove is the size from which on an object is put in parts, several at a time; from 5 MiB to
	// 5 GiB, default 64 MiB: above every shard, since parts are requests that are paid for.
	MultipartAbove int64
	// StorageClass of objects of 128 KiB and more, since smaller ones are charged as if they had as much,
	// and the pool's own small objects do not live long. Default: the bucket's.
	StorageClass string
	// SSE is how the store encrypts: "AES256", "aws:kms" or "aws:kms:dsse", and KMSKey with which key.
	// Default: as the bucket says.
	SSE, KMSKey string
	// Checksum goes with what is stored; default CRC32C.
	Checksum Checksum

	// Credentials: the keys, or Keys, or what the SDK's own chain finds (environment, shared files, web
	// identity, instance role), which is told to look for Profile if that is set.
	AccessKey    string
	SecretKey    string
	SessionToken string // for temporary keys
	// Keys is asked instead, and again after a minute, for keys that are rotated where they lie.
	Keys func(ctx context.Context) (Keys, error)
	// Profile is one of the shared files, with all that it may say: keys, a role and its source, a process,
	// single sign-on. ConfigFile and CredentialsFile are read instead of ~/.aws/config and ~/.aws/credentials.
	Profile         string
	ConfigFile      string
	CredentialsFile string

	// RoleARN is a role that these credentials assume; its own are asked for anew before they expire.
	RoleARN     string
	ExternalID  string // what the role's owner wants to hear, if anything
	SessionName string // how the session is called in the owner's audit log; default "graindisk"
	STSEndpoint string // of the service that gives roles; default Amazon's for the region

	// Dial, if set, makes the connections instead of the system's resolver and dialler.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Checksum is what a store is given to check what arrives.
type Checksum string

// The checksums. CRC32C is kept by the store and checked by whole reads. MD5 is for servers that refuse it, and
// costs some 2 core-seconds per GiB. None trusts the connection.
const (
	CRC32C Checksum = "crc32c"
	MD5    Checksum = "md5"
	None   Checksum = "none"
)

const (
	attemptsDefault  = 3
	multipartDefault = 64 << 20
	multipartMin     = 5 << 20
	multipartMax     = 5 << 30 // what one put can store
	storageClassMin  = 128 << 10
)

// archives are the storage classes from which nothing can be read at once.
var archives = []string{"GLACIER", "DEEP_ARCHIVE"}

func (o Options) withDefaults() Options {
	o.MultipartAbove = cmp.Or(o.MultipartAbove, multipartDefault)
	o.Checksum = cmp.Or(o.Checksum, CRC32C)
	o.Attempts = cmp.Or(o.Attempts, attemptsDefault)
	return o
}

func (o Options) validateObjects() error {
	var errs []error
	if o.MultipartAbove < multipartMin || o.MultipartAbove > multipartMax {
		errs = append(errs, fmt.Errorf("multipart above %d bytes: want %d to %d", o.MultipartAbove, int64(multipartMin), int64(multipartMax)))
	}
	if slices.Contains(archives, o.StorageClass) {
		errs = append(errs, fmt.Errorf("storage class %s: nothing can be read from it at once", o.StorageClass))
	}
	if !slices.Contains([]string{"", "AES256", "aws:kms", "aws:kms:dsse"}, o.SSE) {
		errs = append(errs, fmt.Errorf("encryption %q: want AES256, aws:kms or aws:kms:dsse", o.SSE))
	}
	if o.KMSKey != "" && !strings.HasPrefix(o.SSE, "aws:kms") {
		errs = append(errs, errors.New("a KMS key is for an encryption by aws:kms"))
	}
	if !slices.Contains([]Checksum{CRC32C, MD5, None}, o.Checksum) {
		errs = append(errs, fmt.Errorf("checksum %q: want crc32c, md5 or none", o.Checksum))
	}
	return errors.Join(errs...)
}

func (o Options) validate() error {
	errs := []error{o.validateObjects()}
	if o.Attempts < 0 {
		errs = append(errs, fmt.Errorf("%d attempts", o.Attempts))
	}
	if o.Bucket == "" {
		errs = append(errs, errors.New("no bucket"))
	}
	if o.Prefix != "" {
		if err := backend.CheckKey(o.Prefix); err != nil {
			errs = append(errs, fmt.Errorf("prefix: %w", err))
		}
	}
	if (o.AccessKey == "") != (o.SecretKey == "") {
		errs = append(errs, errors.New("an access key and a secret key are needed, or neither"))
	}
	if places := count(o.AccessKey != "", o.Keys != nil, o.Profile != ""); places > 1 {
		errs = append(errs, errors.New("credentials from several places"))
	}
	if o.RoleARN == "" && (o.ExternalID != "" || o.SessionName != "" || o.STSEndpoint != "") {
		errs = append(errs, errors.New("an external id, a session name or an STS endpoint is for a role, and there is none"))
	}
	errs = append(errs, checkEndpoint("endpoint", o.Endpoint), checkEndpoint("STS endpoint", o.STSEndpoint))
	return errors.Join(errs...)
}

func count(conds ...bool) (n int) {
	for _, c := range conds {
		if c {
			n++
		}
	}
	return n
}

func checkEndpoint(what, endpoint string) error {
	if endpoint == "" {
		return nil
	}
	u, err := url.Parse(endpoint)
	switch {
	case err != nil:
		return fmt.Errorf("%s is not a URL", what) // err might repeat a password
	case u.Scheme != "http" && u.Scheme != "https", u.Host == "", u.User != nil, u.RawQuery != "":
		return fmt.Errorf("%s %s: want http://host[:port] or https://host[:port]", what, u.Redacted())
	}
	return nil
}

// Store is one bucket, below a prefix.
type Store struct {
	o       Options
	client  *s3.Client
	getter  *getter
	keys    *keyring
	bucket  string
	prefix  string // "" or ending in a slash
	name    string
	service string // equal for buckets between which the service copies

	noBatches atomic.Bool // the server does not know DeleteObjects
}

var _ backend.Store = (*Store)(nil)

// Open makes a Store. It sends nothing to the bucket: a store that is away is found out by the
// first call. What credentials there are is found out then, too.
func Open(ctx context.Context, o Options) (*Store, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("s3: invalid options: %w", err)
	}
	httpClient, err := transport.New(transport.Options{CAFile: o.CAFile, Dial: o.Dial})
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	region, keys, err := o.credentials(ctx, httpClient)
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	client := newClient(o, region, keys, httpClient)
	getter, err := newGetter(ctx, o, region, keys, httpClient)
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	s := &Store{o: o, client: client, getter: getter, keys: keys, bucket: o.Bucket, name: "s3://" + o.Bucket, service: strings.TrimRight(o.Endpoint, "/")}
	if s.service == "" {
		s.service = region
	}
	if o.Prefix != "" {
		s.prefix = o.Prefix + "/"
		s.name += "/" + o.Prefix
	}
	if o.Endpoint != "" {
		s.name += " at " + o.Endpoint
	}
	return s, nil
}

func newClient(o Options, region string, creds aws.CredentialsProvider, httpClient *http.Client) *s3.Client {
	so := s3.Options{
		Region:       region,
		Credentials:  creds,
		UsePathStyle: o.PathStyle,
		HTTPClient:   httpClient,
		Retryer:      newRetryer(o.Attempts),
		// Put gives its CRC32C itself, and Get asks for validation: the defaults would use trailing
		// checksums, which not every server knows.
		RequestChecksumCalculation:   aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation:   aws.ResponseChecksumValidationWhenRequired,
		ContinueHeaderThresholdBytes: -1, // "100-continue" costs a round trip and saves nothing here

		DisableLogOutputChecksumValidationSkipped: true,
	}
	if o.Endpoint != "" {
		so.BaseEndpoint = aws.String(o.Endpoint)
	}
	return s3.New(so)
}

// newRetryer makes so many attempts, quickly.
func newRetryer(attempts int) aws.Retryer {
	return retry.NewStandard(func(r *retry.StandardOptions) {
		r.MaxAttempts = attempts
		r.MaxBackoff = 500 * time.Millisecond
		r.RateLimiter = ratelimit.None // the caller knows better what the store can bear
	})
}

// String is "s3://bucket/prefix", and "at endpoint" if it is not Amazon's.
func (s *Store) String() string { return s.name }

// once switches the SDK's retries off.
func once(o *s3.Options) { o.Retryer = aws.NopRetryer{} }

// unsigned leaves the body out of the signature.
func unsigned(o *s3.Options) {
	o.APIOptions = append(o.APIOptions, v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware)
}
