// Package s3 is the driver for S3 and what speaks like it. An object under key k is the object
// <prefix>/k of the bucket.
//
// What it asks of a store, which `pool check` proves: PUT with If-None-Match: * and If-Match decides
// between rivals; GET with Range; a read after a write sees it; ListObjectsV2 is in byte order (S3's
// directory buckets are not). It never uses conditional DELETE or COPY, multipart uploads, or
// versions: stores differ too much there.
//
// Retries. A conditional put is sent once, so that its refusal is never the echo of its own lost
// success. Everything else is sent up to three times within about a second; longer patience, limits
// and time-outs are for the caller (backend/adaptive and ctx).
//
// Integrity. Every PUT carries the body's CRC32C, which the store checks and keeps; a whole GET is
// checked against it. The SHA-256 of the payload is left out of the signature, since without the
// processor's help it costs more than everything else together.
package s3

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
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

	// Credentials; without them the SDK's own chain is asked (environment, shared files, instance role).
	AccessKey    string
	SecretKey    string
	SessionToken string // for temporary keys
}

func (o Options) validate() error {
	var errs []error
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
	if o.Endpoint != "" {
		u, err := url.Parse(o.Endpoint)
		switch {
		case err != nil:
			errs = append(errs, errors.New("endpoint is not a URL")) // err might repeat a password
		case u.Scheme != "http" && u.Scheme != "https", u.Host == "", u.User != nil, u.RawQuery != "":
			errs = append(errs, fmt.Errorf("endpoint %s: want http://host[:port] or https://host[:port]", u.Redacted()))
		}
	}
	return errors.Join(errs...)
}

// Store is one bucket, below a prefix.
type Store struct {
	client *s3.Client
	bucket string
	prefix string // "" or ending in a slash
	name   string
}

var _ backend.Store = (*Store)(nil)

// Open makes a Store. It sends nothing to the bucket: a store that is away is found out by the
// first call. What credentials there are is found out then, too.
func Open(ctx context.Context, o Options) (*Store, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("s3: invalid options: %w", err)
	}
	region, creds := o.Region, aws.CredentialsProvider(
		credentials.NewStaticCredentialsProvider(o.AccessKey, o.SecretKey, o.SessionToken))
	if o.AccessKey == "" || region == "" && o.Endpoint == "" {
		chain, err := config.LoadDefaultConfig(ctx)
		if err != nil {
			return nil, fmt.Errorf("s3: read the AWS configuration: %w", err)
		}
		if o.AccessKey == "" {
			creds = chain.Credentials
		}
		if region == "" {
			region = chain.Region
		}
	}
	if region == "" && o.Endpoint != "" {
		region = "us-east-1" // most other servers accept it or ignore it
	}
	if region == "" {
		return nil, fmt.Errorf("s3: no region for bucket %s: give one, or set AWS_REGION", o.Bucket)
	}
	client, err := newClient(o, region, creds)
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	s := &Store{client: client, bucket: o.Bucket, name: "s3://" + o.Bucket}
	if o.Prefix != "" {
		s.prefix = o.Prefix + "/"
		s.name += "/" + o.Prefix
	}
	if o.Endpoint != "" {
		s.name += " at " + o.Endpoint
	}
	return s, nil
}

func newClient(o Options, region string, creds aws.CredentialsProvider) (*s3.Client, error) {
	client, err := transport.New(transport.Options{CAFile: o.CAFile})
	if err != nil {
		return nil, err
	}
	so := s3.Options{
		Region:       region,
		Credentials:  taggedCredentials{creds},
		UsePathStyle: o.PathStyle,
		HTTPClient:   client,
		Retryer: retry.NewStandard(func(r *retry.StandardOptions) {
			r.MaxAttempts = 3
			r.MaxBackoff = 500 * time.Millisecond
			r.RateLimiter = ratelimit.None // the caller knows better what the store can bear
		}),
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
	return s3.New(so), nil
}

// String is "s3://bucket/prefix", and "at endpoint" if it is not Amazon's.
func (s *Store) String() string { return s.name }

// once switches the SDK's retries off.
func once(o *s3.Options) { o.Retryer = aws.NopRetryer{} }

// unsigned leaves the body out of the signature.
func unsigned(o *s3.Options) {
	o.APIOptions = append(o.APIOptions, v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware)
}

// taggedCredentials lets errors of getting credentials be told from those of using them.
type taggedCredentials struct{ aws.CredentialsProvider }

type noCredentials struct{ error }

func (e noCredentials) Unwrap() error { return e.error }

// Retrieve implements aws.CredentialsProvider.
func (c taggedCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	got, err := c.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		return got, noCredentials{err}
	}
	return got, nil
}
